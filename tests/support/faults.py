"""Faults that happen in a stage of a round which is held until they have: nobody hopes to hit a window of milliseconds.

A stage is held by what it waits for: a site's process that is stopped (SIGSTOP), or a table of the history that is
locked. A fault says what proves that the stage was there; one whose stage slipped away is tried in the next round.
"""

import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psycopg
from machines import Machines

from server.history.store import History

STAGES = ("selection", "training", "upload", "aggregation", "evaluation", "commit")
LOOK = 0.003  # seconds
PATIENCE = 240.0  # seconds, for a stage that is sure to come
SLIPPED = 10.0  # seconds in which a stage that is held shows itself
WATCHED, HELD_BACK = "north", "west"  # the site that training, upload and evaluation are of; the one that comes last


class SlippedError(Exception):
    """The stage was over before it could be held."""


@dataclass(frozen=True)
class Happened:
    """A fault that happened; `seconds` from it to the commit of the round."""

    round: int
    stage: str
    what: str
    proof: str
    seconds: float = 0.0


class Stages:
    """Holds the rounds of one run in their stages."""

    def __init__(self, machines: Machines, history: History, run: str) -> None:
        self.machines, self.history, self.run = machines, history, run

    def committed(self) -> int:
        last = self.history.last_round(self.run)
        return last.number if last else 0

    def playing(self) -> bool:
        attempts = self.history.attempts(self.run)
        return bool(attempts) and attempts[-1].ended_at is None

    def rows(self, number: int) -> list[tuple[str, str | None, str]]:
        return [(row.kind, row.site, row.state) for row in self.history.progress(self.run) if row.round == number]

    def answered(self, number: int, kind: str) -> set[str | None]:
        return {site for of, site, state in self.rows(number) if of == kind and state not in {"asked", "late"}}

    def charged(self, number: int, kind: str, site: str) -> bool:
        try:
            return any(request == f"{self.run}/{number}/{kind}" for _, request, _, _ in self.machines.ledger(site))
        except sqlite3.OperationalError as error:  # it is being written, and its writer is stopped
            raise SlippedError(str(error)) from None

    def at_work(self, number: int, kind: str, site: str) -> int | None:
        """Give the process id of a site's worker that is at work on a request."""
        with suppress(OSError, ValueError):
            said = json.loads((self.machines.site(site) / "state" / "status.json").read_text(encoding="utf-8"))
            task = said["task"] or {}
            if (task.get("run"), task.get("round"), task.get("kind")) == (self.run, number, kind):
                return int(said["worker"]["pid"])
        return None

    def until(self, look: Callable[[], Any], what: str, number: int, seconds: float = PATIENCE) -> Any:
        """Wait for a sign; a round that is over meanwhile has slipped."""
        checked = time.monotonic()
        until = checked + seconds
        while not (found := look()):
            now = time.monotonic()
            if now > until:
                raise SlippedError(f"{what} of round {number}: not within {seconds:g} s")
            if now - checked > 0.2 and self.committed() >= number:
                raise SlippedError(f"{what} of round {number} was not seen")
            checked = now if now - checked > 0.2 else checked
            time.sleep(LOOK)
        return found

    @contextmanager
    def held(self, stage: str, number: int) -> Iterator[str]:
        """Hold round `number` in a stage; give what proves it."""
        hold = {
            "selection": self._selection,
            "training": lambda at: self._working(at, "train"),
            "upload": self._upload,
            "aggregation": self._aggregation,
            "evaluation": lambda at: self._working(at, "evaluate"),
            "commit": self._commit,
        }[stage]
        with hold(number) as proof:
            yield proof

    @contextmanager
    def _locked(self, table: str, mode: str) -> Iterator[Callable[[], bool]]:
        """Lock a table; give what tells whether somebody waits for it."""
        url = self.machines.database.replace("postgresql+psycopg://", "postgresql://")
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = %s::regclass"
        with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as looker:
            holder.execute(f"LOCK TABLE {table} IN {mode} MODE")
            yield lambda: bool(looker.execute(waiting, [table]).fetchone()[0])  # type: ignore[index]
            holder.rollback()

    @contextmanager
    def _selection(self, number: int) -> Iterator[str]:
        self.until(self.playing, "an attempt", number)
        with self._locked("site_keys", "ACCESS EXCLUSIVE") as waited_for:
            self.until(waited_for, "selection", number, SLIPPED)
            if any(state == "asked" and kind == "train" for kind, _, state in self.rows(number)):
                raise SlippedError("sites are asked already")
            yield "the ServerApp waits for the sites' keys, and no site is asked yet"

    @contextmanager
    def _working(self, number: int, kind: str) -> Iterator[str]:
        pid = self.until(lambda: self.at_work(number, kind, WATCHED), f"a worker at {kind}", number)
        with stopped(pid):
            if self.charged(number, kind, WATCHED):
                raise SlippedError(f"{kind} is done")
            yield f"{WATCHED}'s worker was stopped at {kind}, before anything was charged"

    @contextmanager
    def _upload(self, number: int) -> Iterator[str]:
        node = self.machines.processes[WATCHED].pid
        self.until(lambda: self.charged(number, "train", WATCHED), "a charge", number)
        with stopped(node):
            time.sleep(0.5)  # what is with the ServerApp would be written by then
            if WATCHED in self.answered(number, "train"):
                raise SlippedError("the reply is there")
            yield f"{WATCHED}'s ledger has the charge, and the ServerApp has no reply"

    @contextmanager
    def _aggregation(self, number: int) -> Iterator[str]:
        worker = self.machines.wait_for(lambda: self.machines.found(f"worker:{HELD_BACK}"), "worker")
        with stopped(worker.pid):
            self.until(lambda: {"north", "south"} <= self.answered(number, "train"), "two replies", number)
            if HELD_BACK in self.answered(number, "train"):
                raise SlippedError("all replies are there")
            yield f"two replies are folded in, and {HELD_BACK}'s worker is stopped"

    @contextmanager
    def _commit(self, number: int) -> Iterator[str]:
        with self._locked("rounds", "EXCLUSIVE") as waited_for:
            self.until(waited_for, "commit", number)
            digests = {round.checkpoint.digest for round in self.history.rounds(self.run)}
            files = list((self.machines.state / "runs" / self.run / "checkpoints").glob("*.safetensors"))
            if all(file.stem in digests for file in files):
                raise SlippedError("no checkpoint that is not committed")
            yield "the checkpoint is written, and its commit waits for the table of rounds"


def play(machines: Machines, run: str, faults: list[tuple[str, str, Callable[[], Any], Callable[[], Any]]]) -> None:
    """Let faults happen, each in its stage of a round of its own; note them in `faults.json`.

    Parameters
    ----------
    faults
        Of each: its stage, its name, what happens while the stage is held, and what is done once it is let go.
    """
    happened: list[Happened] = []
    with machines.history() as history:
        stages, slips = Stages(machines, history, run), 0
        for stage, what, act, mend in faults:
            while True:
                number = stages.committed() + 1
                try:
                    with stages.held(stage, number) as proof:
                        act()
                        at = time.monotonic()
                    break
                except SlippedError as slipped:
                    slips += 1
                    if slips > len(faults) + 2:
                        raise TimeoutError(f"{stage} slips away: {slipped}; logs in {machines.folder}") from None
            mend()
            machines.wait_for(lambda number=number: stages.committed() >= number, f"round {number}", PATIENCE)
            happened.append(Happened(number, stage, what, proof, round(time.monotonic() - at, 1)))
            (machines.folder / "faults.json").write_text(json.dumps([asdict(each) for each in happened], indent=1))
    for each in happened:
        print(f"round {each.round}: {each.what} in {each.stage}; {each.seconds} s to its commit")  # noqa: T201


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Let a process stand still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def wrong_clock(folder: Path) -> tuple[dict[str, str], Callable[[float], None]] | None:
    """Make a clock that can be set; give the environment of processes that go by it, and what sets it, in seconds.

    None without a C compiler.
    """
    if (compiler := shutil.which("cc")) is None:
        return None
    library, file = folder / "clock.so", folder / f"clock-{secrets.token_hex(2)}"
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source], check=True)

    def set_to(seconds: float) -> None:
        fresh = file.with_suffix(".new")
        fresh.write_text(f"{seconds:.0f}", encoding="ascii")
        fresh.replace(file)

    set_to(0)
    return {"LD_PRELOAD": str(library), "MOONFLOWER_TEST_CLOCK": str(file)}, set_to
