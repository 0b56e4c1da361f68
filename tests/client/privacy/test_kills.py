"""A site is killed with SIGKILL while it answers, then asked again: nothing is sent that its ledger has not charged.

What was sent is known from outside of the ledger: the site's process writes each reply's digest, durably, to a file of
its own at the moment when it would send it. After every kill the test reads that file beside the ledger and asks:
does each sent reply have its event, is the budget kept, is the chain whole, is nothing left reserved, and does the
same request get the same bytes? A SIGKILL ends a process and not the machine: what a power failure loses of what
was synced is for SQLite and the disk.
"""

import hashlib
import json
import os
import random
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from client import answers
from client.privacy import unpaid
from client.privacy.randomness import Keystream
from shared import accounting, ledger_chain, messages
from shared.errors import BudgetError
from shared.messages import EvaluateRequest, TrainRequest

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
DONE, EXHAUSTED, BROKEN = 0, 3, 4
ROUNDS = 6


class Site:
    """A real site, warm, whose ledger can be begun anew; each child is a process of it."""

    def __init__(self, desk: Any, log: Path) -> None:
        self.desk, self.log = desk, log
        self.arrays = desk.start()
        self.ledger_file: Path = desk.site.ledger
        desk.randomness = lambda _: Keystream.from_system()
        self.ask("train", 1), self.ask("evaluate", 1)  # all that is slow at first is done before a fork
        began = time.monotonic()
        self.ask("evaluate", 2)
        self.seconds = time.monotonic() - began  # that an answer takes, on this machine as busy as it is
        self.begin_anew()

    def begin_anew(self) -> None:
        for file in self.ledger_file.parent.glob(f"{self.ledger_file.name}*"):
            file.unlink()
        self.log.write_bytes(b"")

    def ask(self, kind: str, number: int, run: str = "run") -> bytes:
        """Ask as the coordinator would, and return the answer's bytes."""
        request: Any = (TrainRequest if kind == "train" else EvaluateRequest)(
            run, self.desk.config.as_json(), number, self.arrays
        )
        reply = answers.answer(self.desk.resident, self.desk.site, kind, request, self.desk.randomness)  # type: ignore[arg-type]
        return messages.to_bytes(reply)

    def send(self, kind: str, number: int, run: str, reply: bytes) -> None:
        """Write down, durably, that the reply leaves the site now."""
        line = json.dumps([run, kind, number, hashlib.sha256(reply).hexdigest()]) + "\n"
        log = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        os.write(log, line.encode())
        os.fsync(log)
        os.close(log)

    def sent(self) -> dict[tuple[str, str, int], set[str]]:
        """Return the digests of what was sent, by run, kind and round."""
        found: dict[tuple[str, str, int], set[str]] = {}
        for line in self.log.read_text().splitlines():
            run, kind, number, digest = json.loads(line)
            found.setdefault((run, kind, number), set()).add(digest)
        return found

    def fork(self, work: Callable[[], None]) -> int:
        """Do `work` in a process of its own, and return its id."""
        child = os.fork()
        if child:
            return child
        try:
            work()
            os._exit(DONE)
        except BudgetError:
            os._exit(EXHAUSTED)
        except BaseException:
            traceback.print_exc()
            os._exit(BROKEN)

    def check(self) -> None:
        """Compare what was sent with what the ledger holds."""
        sent = self.sent()
        assert all(len(digests) == 1 for digests in sent.values()), "a retry was answered with other bytes"
        with self.desk.ledger() as ledger:
            export, spends = ledger.export(), ledger.spends()
            assert ledger_chain.verify(export) is None
            assert ledger.reservations() == [], "a dead process's reservation blocks the budget"
            charged = {(s.question.run, s.question.kind, s.question.round) for s in spends}
            assert len(charged) == len(spends), "a round was charged twice"
            assert set(sent) <= charged, "a reply was sent that was not charged"
            budget = accounting.rdp_budget(ledger.max_epsilon, ledger.delta, ledger.order)
            for part in answers.PARTS:
                prices = [accounting.rdp(s.release, ledger.order) for s in spends if s.question.part == part]
                assert sum(prices) <= budget * (1 + 1e-12), "the releases are above the budget"
            for spend in spends:  # the kept bytes are the sent ones
                question = spend.question
                newest = max(
                    s.question.round
                    for s in spends
                    if (s.question.run, s.question.kind) == (question.run, question.kind)
                )
                key = (question.run, question.kind, question.round)
                if question.round == newest and key in sent:
                    kept = ledger.recall(question)
                    assert kept is not None
                    assert sent[key] == {hashlib.sha256(kept).hexdigest()}


@pytest.fixture
def site(new_desk: Callable[..., Any], tmp_path: Path) -> Iterator[Site]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    config = {"training": {"rounds": ROUNDS, "local_steps": 1}}
    yield Site(new_desk(config=config, site={"privacy": {"max_epsilon": 12.0}}), tmp_path / "sent")
    torch.set_num_threads(threads)


# -- at every boundary ------------------------------------------------------------------------------------------


def die_at(boundary: int, folder: Path, seen: Path) -> None:
    """Have this process killed right before the given statement or file operation that changes the site's folder.

    Between two of them nothing on disk changes, so these are all the states that a kill can leave but those inside of
    a commit, which the random kills are for. SQLite's trace and Python's audit hooks tell of each, in the real code.
    """
    count = 0
    names = os.open(seen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def tick(what: str) -> None:
        nonlocal count
        count += 1
        os.write(names, f"{what}\n".encode())
        if count == boundary:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_statement(statement: str) -> None:
        verb = statement.split()[0].upper()
        if verb not in ("SELECT", "PRAGMA", "CREATE", "--"):  # a file is created in one transaction, on a draft
            tick(" ".join(statement.split()[:3]))

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.link", "fcntl.flock"):
            tick(event)
        elif event == "open" and arguments[2] & os.O_ACCMODE and str(arguments[0]).startswith(str(folder)):
            tick(f"open {Path(str(arguments[0])).suffix}")

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = right(*arguments, **options)
        connection.set_trace_callback(on_statement)
        return connection

    right, sqlite3.connect = sqlite3.connect, connect  # type: ignore[assignment]
    sys.addaudithook(on_event)


@pytest.mark.parametrize("kind", ["evaluate", pytest.param("train", marks=pytest.mark.slow)])
def test_a_kill_at_any_boundary_of_an_answer_loses_no_spend_and_no_reply(site: Site, kind: str, tmp_path: Path) -> None:
    """Power: each boundary is tried, so a wrong order of any two of the path's durable steps shows."""
    boundary, status, seen = 0, -signal.SIGKILL, tmp_path / "seen"
    sent_before_the_kill = 0

    def work() -> None:
        die_at(boundary, site.ledger_file.parent, seen)
        site.send(kind, 1, "run", site.ask(kind, 1))
        site.send(kind, 1, "run", site.ask(kind, 1))  # the coordinator asks again

    while status == -signal.SIGKILL:
        boundary += 1
        site.begin_anew()
        _, raw = os.waitpid(site.fork(work), 0)
        status = os.waitstatus_to_exitcode(raw)
        assert status in (-signal.SIGKILL, DONE)
        sent_before_the_kill += bool(site.sent())
        site.check()
        first = site.ask(kind, 1)
        site.send(kind, 1, "run", first)
        assert site.ask(kind, 1) == first
        site.check()
        assert site.desk.spent() == 1
    names = seen.read_text().splitlines()
    assert boundary == len(names) + 1
    assert sent_before_the_kill > 1
    for step in ("BEGIN IMMEDIATE", "INSERT INTO spends", "INSERT INTO replies", "COMMIT", "os.rename", "fcntl.flock"):
        assert step in names
    print(f"{boundary - 1} boundaries of one {kind} answer and its retry: {', '.join(names)}")  # noqa: T201


# -- at random --------------------------------------------------------------------------------------------------


def answer_rounds(site: Site, run: str, first: int) -> None:
    for number in range(first, ROUNDS + 1):
        site.send("evaluate", number, run, site.ask("evaluate", number, run))


@pytest.mark.parametrize("kills", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_kills_at_random_moments_miss_no_spend_and_pass_no_budget(
    site: Site, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs at once on one budget that holds one and a half of them, each killed at a random moment and begun again.

    No fault in 1,000 kills bounds the rate of faults below 0.3 % at 95 % confidence (0.997 ** 1000 < 0.05), and
    no fault in 50 below 6 %.
    """
    monkeypatch.setattr(unpaid, "MOST", 10**6)  # on a busy machine 20 kills in a row are no wonder
    seed = int.from_bytes(os.urandom(4))
    chance = random.Random(seed)  # noqa: S311
    print(f"seed {seed}")  # noqa: T201
    killed = lives = exhausted = unsent = 0
    started = time.monotonic()
    while killed < kills:
        first = {"one": 1, "two": 1}
        running = set(first)
        lives += 1
        site.begin_anew()
        while running and killed < kills:
            children = {site.fork(partial(answer_rounds, site, run, first[run])): run for run in sorted(running)}
            for child, run in chance.sample(sorted(children.items()), len(children)):
                time.sleep(chance.uniform(0, min(0.4, 3 * site.seconds)))
                os.kill(child, signal.SIGKILL)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                assert status in (-signal.SIGKILL, DONE, EXHAUSTED)
                killed += status == -signal.SIGKILL
                exhausted += status == EXHAUSTED
                if status != -signal.SIGKILL:
                    running.discard(run)
            site.check()
            with site.desk.ledger() as ledger:
                for spend in ledger.spends():
                    first[spend.question.run] = spend.question.round  # asked again: the same bytes
                unsent += len(ledger.spends()) - len(site.sent())
    print(  # noqa: T201
        f"{killed} kills in {time.monotonic() - started:.0f} s over {lives} ledgers: 0 sent replies without a spend, "
        f"0 releases above the budget; {exhausted} runs ended by an exhausted budget, {unsent} times a charged reply was "
        "sent only after a retry"
    )
    assert exhausted > 0 or kills < 100
