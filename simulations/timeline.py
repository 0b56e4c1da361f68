"""Simulated time for an in-process Grid: replies come when the sites' weather says, and nobody waits for it.

A question is answered when its site would have done its work, and its reply is there when that would have travelled: the
clock jumps from one arrival to the next. What a round's deadline cuts off is computed and charged all the same, when its
time has come. Between its questions a site's work is in order: it begins one when it is done with the last.
"""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from shared.messages import FLOWER_TYPES, Kind, content_size, size
from shared.run_config import RunConfig
from simulations.dynamics import Weather
from simulations.grid import InProcessGrid, stand_in

KINDS: dict[str, Kind] = {name: kind for kind, name in FLOWER_TYPES.items()}
GONE = "the site has dropped out."


@dataclass(frozen=True)
class Before:
    """What an earlier attempt left: the simulated time, and the questions under way then.

    `begun` has, by node, round and kind, how many seconds before that time a question was sent.
    """

    time: float = 0.0
    begun: Mapping[tuple[int, int, Kind], float] = field(default_factory=dict)


@dataclass(order=True)
class Event:
    """Something that happens to a message: its work is done, or its reply is there."""

    at: float
    order: int
    key: str = field(compare=False)
    reply: Message | None = field(compare=False, default=None)


class Timeline:
    """A clock that stands still but when it is waited on, and what is to come.

    Parameters
    ----------
    finish
        Computes the answer to a message whose work is done at a time; returns when it arrives, and the reply.
    prefer
        Told of the keys that will be finished next, up to a time, in order.
    """

    simulated = True

    def __init__(
        self,
        start: float,
        finish: Callable[[str, float], tuple[float, Message]],
        prefer: Callable[[list[str]], None],
        ahead: int,
    ) -> None:
        self._now, self._finish, self._prefer, self._ahead = start, finish, prefer, ahead
        self._numbers = count()
        self._work: list[Event] = []
        self._coming: list[Event] = []
        self._there: dict[str, Message] = {}  # in order of arrival

    def now(self) -> float:
        """Return the simulated time, in seconds."""
        return self._now

    def wait(self, pause: float, until: float) -> None:  # noqa: ARG002 - as `server.clock.Clock`'s
        """Go to the next arrival, or to `until` where none comes before."""
        self._work_until(until)
        self._now = max(self._now, min(until, self._coming[0].at if self._coming else until))
        self._arrive()

    def works(self, key: str, done: float) -> None:
        """Note that a message's work is done at a time."""
        heapq.heappush(self._work, Event(done, next(self._numbers), key))

    def comes(self, key: str, at: float, reply: Message) -> None:
        """Note that a reply is there at a time."""
        heapq.heappush(self._coming, Event(at, next(self._numbers), key, reply))

    def take(self, wanted: set[str]) -> Message | None:
        """Return the first of these replies that has come."""
        self._work_until(self._now)
        self._arrive()
        key = next((key for key in self._there if key in wanted), None)
        return None if key is None else self._there.pop(key)

    def _work_until(self, until: float) -> None:
        """Finish, in order, all work that may tell what comes next, up to a time."""
        while self._work and self._work[0].at <= min(
            until, max(self._now, self._coming[0].at if self._coming else math.inf)
        ):
            self._prefer([event.key for event in heapq.nsmallest(self._ahead, self._work) if event.at <= until])
            event = heapq.heappop(self._work)
            at, reply = self._finish(event.key, event.at)
            self.comes(event.key, at, reply)

    def _arrive(self) -> None:
        while self._coming and self._coming[0].at <= self._now:
            event = heapq.heappop(self._coming)
            if event.reply is not None:
                self._there[event.key] = event.reply


class TimedGrid(Grid):
    """An in-process Grid whose nodes take simulated time, come and go.

    Parameters
    ----------
    names
        A node's site.
    before
        What an earlier attempt left.
    ahead
        Messages that the inner grid is given at once, where it works on several side by side.
    began
        Told of a node before it is asked to train for the first time.
    """

    in_process = True

    def __init__(
        self,
        inner: InProcessGrid,
        names: Callable[[int], str],
        config: RunConfig,
        weather: Weather,
        *,
        before: Before | None = None,
        ahead: int = 1,
        began: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._inner, self._name, self._config, self._weather, self._began = inner, names, config, weather, began
        before = before or Before()
        self.clock = Timeline(before.time, self._finish, self._hand_over, ahead)
        self._under_way: dict[str, Message] = {}  # what sites are at work on
        self._given: set[str] = set()  # of it, what the inner grid has
        self._joining: set[str] = set()  # what takes no time
        self._sent = {question: before.time - elapsed for question, elapsed in before.begun.items()}
        self._free: dict[int, float] = {}  # when a node is done with all that it was asked
        self._tries: Counter[tuple[int, int, Kind]] = Counter()
        self._trained: set[int] = set()
        for (node, number, kind), sent in self._sent.items():
            self._free[node] = sent + self._work(node, number, kind)

    def set_run(self, run: Run) -> None:
        """Set the Flower run."""
        self._inner.set_run(run)

    @property
    def run(self) -> Run:
        """The Flower run."""
        return self._inner.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as `Message()` does."""
        return self._inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are there now."""
        churn, nodes = self._weather.dynamics.churn, self._inner.get_node_ids()
        if not churn.late and churn.lifetime is None:
            return nodes
        return [node for node in nodes if self._leaves(node, self.clock.now()) is not None]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Set sites to work, in simulated time."""
        ids = []
        for message in messages:
            if KINDS[message.metadata.message_type] == "join":
                (key,) = self._inner.push_messages([message])
                self._joining.add(key)
            else:
                key = self._inner.name(message)
                self._begin(key, message)
            ids.append(key)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return a reply to one of these messages that has come; nobody waits for it."""
        wanted = message_ids if isinstance(message_ids, set) else set(message_ids)
        if joining := wanted & self._joining:
            for reply in self._inner.pull_messages(joining):
                self._joining.discard(reply.metadata.reply_to_message_id)
                return [reply]
        come = self.clock.take(wanted)
        return [] if come is None else [come]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the replies that come in `timeout` seconds."""
        wanted, replies = set(self.push_messages(messages)), list[Message]()
        until = self.clock.now() + (math.inf if timeout is None else timeout)
        while wanted:
            for reply in self.pull_messages(wanted):
                wanted.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
                break
            else:
                if self.clock.now() >= until:
                    break
                self.clock.wait(0.0, until)
        return replies

    def _begin(self, key: str, message: Message) -> None:
        """Note when a message's work is done, or that it will not be."""
        to, now = message.metadata, self.clock.now()
        node, number, kind = to.dst_node_id, int(to.group_id), KINDS[to.message_type]
        site, notice = self._name(node), self._weather.dynamics.dropout.notice
        if kind == "train" and node not in self._trained:
            self._trained.add(node)
            self._began(node)
        question = node, number, kind
        travels = self._weather.transfer(site, content_size(message.content))
        if question in self._sent:
            start = self._sent.pop(question) + travels
        else:
            start = max(now + travels, self._free.get(node, 0.0))
        done = start + self._work(*question)
        leaves = self._leaves(node, now)
        dropped = self._weather.dropped(site, number, kind, self._tries[question])
        self._tries[question] += 1
        gone = min(now if leaves is None else leaves, math.inf if dropped is None else start + dropped * (done - start))
        self._free[node] = min(gone, done)
        if gone < done:
            self.clock.comes(key, max(now, gone + notice), stand_in(message, GONE, ErrorCode.NODE_UNAVAILABLE))
        else:
            self._under_way[key] = message
            self.clock.works(key, done)

    def _finish(self, key: str, done: float) -> tuple[float, Message]:
        """Compute a reply, and say when it is there."""
        self._hand_over([key])
        message = self._under_way.pop(key)
        self._given.discard(key)
        (reply,) = self._inner.pull_messages({key})
        node = message.metadata.dst_node_id
        there, leaves = done + self._weather.transfer(self._name(node), size(reply)), self._leaves(node, done)
        if leaves is not None and leaves < there:  # charged, and never heard of
            notice = self._weather.dynamics.dropout.notice
            return leaves + notice, stand_in(message, GONE, ErrorCode.NODE_UNAVAILABLE)
        return there, reply

    def _hand_over(self, keys: list[str]) -> None:
        """Give the inner grid what will be finished next, so that it can work on several at once."""
        for key in keys:
            if key not in self._given:
                self._given.add(key)
                self._inner.give(self._under_way[key])

    def _work(self, node: int, number: int, kind: Kind) -> float:
        return self._weather.work(self._name(node), number, kind, self._config.place(number)[1].local_steps)

    def _leaves(self, node: int, now: float) -> float | None:
        """Return when a node leaves that is there now; None where it is not."""
        for begin, end in self._weather.stays(self._name(node)):
            if now < end:
                return end if begin <= now else None
        return None
