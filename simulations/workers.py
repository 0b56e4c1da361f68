"""Worker processes for an in-process Grid: each keeps one model, and sites take their turns in it.

A question lies in memory once, which every worker maps into its own, whatever the number of sites that it answers for; a reply comes back over a pipe. Two messages at a time are at a worker, so that it has the next
one when it is done. Who answers for which site changes no bit of the answer: a site's randomness is its own, and what a
worker keeps can be made again.
"""

import logging
import mmap
import multiprocessing
import os
import pickle
import signal
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.supercore.task_identity import TaskIdentity

from shared.errors import let_interrupts_through
from shared.messages import Held
from shared.processes import die_with_parent
from simulations.grid import InProcessGrid, NodeConfig, stand_in

log = logging.getLogger("moonflower.simulation")

AHEAD = 2  # messages at a worker: one under way, and the next
LEAVE = 5.0  # seconds until a worker that does not end is ended
ALIGNED = 64  # bytes that an array's place is a multiple of

AppOf = Callable[[], ClientApp]  # picklable: it runs in the worker
Question = tuple[int, str]  # its number, and the file that it can be read from
Task = tuple[str, int, NodeConfig, str, Question]  # message's id, node, its configuration, message's type


class WorkerGrid(InProcessGrid):
    """Virtual nodes whose messages run in worker processes; a context manager, which ends them.

    Parameters
    ----------
    app_of
        Makes a worker's ClientApp.
    devices
        A worker each: the CUDA device that it sees, or None. Several may share one.
    threads
        Of a worker's arithmetic. Another number can change the last bits of a result, the number of workers cannot.
    """

    def __init__(
        self,
        app_of: AppOf,
        nodes: Mapping[int, NodeConfig],
        *,
        devices: list[str | None],
        threads: int,
        run_id: int = 1,
    ) -> None:
        super().__init__(ClientApp(), nodes, run_id)
        self._start = partial(_Worker, app_of, threads, run_id)
        self._devices = devices
        self._workers: list[_Worker] = []
        self._done: deque[Message] = deque()

    def __enter__(self) -> Self:
        self._workers = [self._start(device) for device in self._devices]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.leave()
        for worker in self._workers:
            worker.end()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return a reply to one of these messages: wait for the first that is there, or return none where none is under way."""
        wanted: Collection[str] = message_ids if isinstance(message_ids, set) else set(message_ids)
        while True:
            for reply in self._done:
                if reply.metadata.reply_to_message_id in wanted:
                    self._done.remove(reply)
                    return [reply]
            self._feed()
            if not any(worker.under_way for worker in self._workers):
                return []
            self._hear()

    def _feed(self) -> None:
        for worker in sorted(self._workers, key=lambda each: len(each.under_way)):
            while self._waiting and len(worker.under_way) < AHEAD:
                message = self._waiting.pop(next(iter(self._waiting)))
                worker.ask(message, self._nodes[message.metadata.dst_node_id], self._question(message.content))

    def _hear(self) -> None:
        """Wait for what the first worker says; one that died is replaced, and what it had gets an error for an answer."""
        ready = wait([worker.pipe for worker in self._workers])
        for number, worker in enumerate(self._workers):
            if worker.pipe not in ready:
                continue
            try:
                self._done.append(worker.hear())
            except (EOFError, OSError):
                log.error("a worker died (exit code %s)", worker.exit_code())
                self._done.extend(
                    stand_in(message, "WorkerDied", ErrorCode.CLIENT_APP_CRASHED)
                    for message in worker.under_way.values()
                )
                worker.end()
                self._workers[number] = self._start(self._devices[number])

    def _question(self, content: RecordDict) -> Question:
        """Return where a question is: in memory that this process holds for as long as it holds the question."""
        if not isinstance(content, Held):
            raise TypeError("workers are asked by what stays on its machine")
        if "question" not in content.__dict__:
            memory = os.memfd_create("moonflower-question")
            weakref.finalize(content, os.close, memory)
            with os.fdopen(memory, "wb", closefd=False) as stream:
                _write(stream, content.message)
            content.__dict__["question"] = next(self._numbers), f"/proc/{os.getpid()}/fd/{memory}"
        found: Question = content.__dict__["question"]
        return found


class _Worker:
    """One worker process, and the messages that it has."""

    def __init__(self, app_of: AppOf, threads: int, run_id: int, device: str | None) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take torch's threads and the keystreams along
        self.pipe, theirs = context.Pipe()
        self.under_way: dict[str, Message] = {}
        self._mapped: dict[str, memoryview] = {}  # the worker's memory for replies
        values = (theirs, app_of, threads, run_id, device, os.getpid())
        self._process = context.Process(target=_work, args=values, name="site worker", daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, message: Message, config: NodeConfig, question: Question) -> None:
        """Give it a message."""
        to = message.metadata
        self.under_way[to.message_id] = message
        task: Task = (to.message_id, to.dst_node_id, config, to.message_type, question)
        with suppress(OSError):  # it has died: `hear` finds out
            self.pipe.send(task)

    def hear(self) -> Message:
        """Read a reply.

        Raises
        ------
        EOFError, OSError
            Where the worker has died.
        """
        key, head, places, file, error = self.pipe.recv()
        message = self.under_way.pop(key)
        if error is not None:
            return stand_in(message, error)
        # Copied: the worker writes the reply after the next one to the same place.
        buffers = [bytearray(self._memory(file)[start:end]) for start, end in places]
        return Message(Held(pickle.loads(head, buffers=buffers)), reply_to=message)  # noqa: S301 - our own process's

    def _memory(self, file: str) -> memoryview:
        """Return a file of the worker's memory, mapped into this process's; the one before has gone."""
        if file not in self._mapped:
            with Path(file).open("rb") as stream:
                self._mapped = {file: memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))}
        return self._mapped[file]

    def exit_code(self) -> int | None:
        """Return how it ended, if it has."""
        self._process.join(LEAVE)
        return self._process.exitcode

    def leave(self) -> None:
        """Tell it to end when it has done what it is at."""
        self.pipe.close()

    def end(self) -> None:
        """Wait for it to end, and end it where it takes too long."""
        self.leave()
        self._process.join(LEAVE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(pipe: Connection, app_of: AppOf, threads: int, run_id: int, device: str | None, parent: int) -> None:
    """Answer until the pipe is closed: what a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's goes to all: the parent says when to leave
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch

    torch.set_num_threads(threads)
    app, contexts = app_of(), dict[int, Context]()
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, 1
    held: tuple[int, Held] | None = None
    out = _Outgoing()
    with suppress(EOFError, OSError):  # the parent has gone, or has closed the pipe
        while True:
            key, node, config, kind, (number, file) = pipe.recv()
            if held is None or held[0] != number:
                held = number, Held(_read(Path(file)))
            message = Message(held[1], node, kind)
            context = contexts.get(node) or Context(run_id, node, config, state=RecordDict(), run_config={})
            reply, error = None, None
            try:
                content = app(message=message, context=context).content
                reply = content.message if isinstance(content, Held) else None
            except Exception as failed:
                let_interrupts_through(failed)
                log.exception("the ClientApp of node %d failed", node)
                error = type(failed).__name__
            pipe.send((key, *out.put(reply), error))


class _Outgoing:
    """A worker's memory for replies: as many places as it can be ahead, used in turn."""

    def __init__(self) -> None:
        self._size, self._turn, self._file = 0, 0, ""
        self._mapped: mmap.mmap | None = None
        self._descriptor = -1

    def put(self, reply: Any) -> tuple[bytes, list[tuple[int, int]], str]:
        """Write a reply's arrays; return the rest of it as a pickle, where the arrays lie, and in which file."""
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(reply, protocol=5, buffer_callback=buffers.append)
        raws = [buffer.raw() for buffer in buffers]
        needed = sum(len(raw) + ALIGNED for raw in raws)
        if needed > self._size:
            self._grow(needed)
        self._turn = (self._turn + 1) % AHEAD
        places, place = [], self._turn * self._size
        for raw in raws:
            place += -place % ALIGNED
            if self._mapped is not None:
                self._mapped[place : place + len(raw)] = raw
            places.append((place, place + len(raw)))
            place += len(raw)
        return head, places, self._file

    def _grow(self, size: int) -> None:
        """Take a larger file; the old one stays for whoever has mapped it, and for a reply in it that is not read yet."""
        self._size = size
        self._descriptor = os.memfd_create("moonflower-replies")
        os.ftruncate(self._descriptor, size * AHEAD)
        self._mapped = mmap.mmap(self._descriptor, size * AHEAD)
        self._file = f"/proc/{os.getpid()}/fd/{self._descriptor}"


def _write(stream: BinaryIO, message: Any) -> None:
    """Write a message as `_read` maps it: a pickle, and its arrays' values apart from it."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    raws = [buffer.raw() for buffer in buffers]
    index = pickle.dumps((head, [len(raw) for raw in raws]))
    stream.write(len(index).to_bytes(8, "little") + index)
    for raw in raws:
        stream.write(bytes(-stream.tell() % ALIGNED))
        stream.write(raw)


def _read(path: Path) -> Any:
    """Map a message into memory; what is written to its arrays stays in this process."""
    with path.open("rb") as stream:
        mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    place = 8 + int.from_bytes(mapped[:8], "little")
    head, sizes = pickle.loads(mapped[8:place])  # noqa: S301 - our own process's
    buffers = []
    for size in sizes:
        place += -place % ALIGNED
        buffers.append(mapped[place : place + size])
        place += size
    return pickle.loads(head, buffers=buffers)  # noqa: S301 - our own process's
