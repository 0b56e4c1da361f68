"""A federation on the disk and the command line over it, as a user has them: real processes, looked at from outside."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant

from server.history.store import History

SITES = {"north": 60, "south": 80, "west": 100}
ROUNDS = 12
GOOD, BAD = ("good", "great", "fine", "lovely", "bright"), ("bad", "awful", "poor", "dull", "grim")
FILLING = ("the", "a", "film", "book", "song", "was", "is", "really", "so", "we", "found", "it", "and", "very")
PATIENCE = 120.0  # seconds, for anything that is sure to come


@dataclass
class Federation:
    """A folder with a scenario and its data, a home of its own, and the processes that a test starts in it."""

    folder: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def scenario(self) -> str:
        return str(self.folder / "scenario.toml")

    @property
    def database(self) -> str:
        return f"sqlite:///{self.home / 'history.db'}"

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start `moonflower ARGUMENTS`."""
        command = shutil.which("moonflower", path=str(Path(sys.executable).parent))
        assert command is not None
        process = subprocess.Popen(
            [command, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.folder,
            preexec_fn=hear_interrupts,
        )
        self.processes.append(process)
        return process

    def moonflower(self, *arguments: str) -> str:
        """Run `moonflower ARGUMENTS` to its good end, and give what it printed."""
        process = self.start(*arguments)
        printed, said = process.communicate(timeout=2 * PATIENCE)
        assert process.returncode == 0, f"exit {process.returncode}: {printed}{said}"
        assert "Traceback" not in said, said
        return printed

    def listed(self, *arguments: str) -> list[dict[str, Any]]:
        """Give what a history command lists."""
        rows: list[dict[str, Any]] = json.loads(
            self.moonflower("history", *arguments, "--limit", "0", "--format", "json", "--database", self.database)
        )
        return rows

    def run(self, run: str) -> Path:
        return self.home / "runs" / run

    def asked(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask the history's file from outside; nothing where it is not there yet."""
        return ask(self.home / "history.db", query, *values)

    def newest_run(self) -> str:
        def look() -> list[tuple[Any, ...]]:
            for process in self.processes:
                assert not process.poll(), process.communicate()
            return self.asked("SELECT id FROM runs ORDER BY created_at DESC LIMIT 1")

        return str(wait_for(look, "run")[0][0])

    def committed(self, run: str) -> int:
        """The last round that the history has; 0 before the first."""
        found = self.asked("SELECT max(number) FROM rounds WHERE run_id = ?", run)
        return (found[0][0] or 0) if found else 0

    def attempts(self, run: str) -> list[tuple[str | None, str | None]]:
        """Each attempt's outcome and error, in order."""
        return [
            (outcome, error)
            for outcome, error in self.asked(
                "SELECT outcome, error FROM attempts WHERE run_id = ? ORDER BY number", run
            )
        ]

    def spends(self, run: str, site: str) -> list["LedgerRow"]:
        """What a site's ledger file holds, read without Moonflower."""
        rows = ask(
            self.run(run) / "sites" / site / "ledger.db",
            "SELECT run, request, round, part, sampling_rate, noise_multiplier, steps FROM spends ORDER BY id",
        )
        return [LedgerRow(*row) for row in rows]

    def charged(self, run: str, number: int) -> list[str]:
        """The sites whose ledger has round `number`'s training."""
        return [site for site in SITES if f"{run}/{number}/train" in [row.request for row in self.spends(run, site)]]

    def wait_for(self, look: Callable[[], Any], what: str) -> Any:
        """Look until something is there, and give it."""
        return wait_for(look, what)

    def assert_finished_and_accounted_for(self, run: str, rounds: int = ROUNDS, database: str = "") -> None:
        """Assert what holds of a finished run, whatever happened to its processes on the way.

        Every round is there once; each ledger has one spend for each release, and no other; the history says what
        the ledgers say; epsilon is what an accountant of our own makes of the ledgers' rows; the newest checkpoints are
        on the disk and whole.
        """
        with History.open(database or self.database, create=False) as history:
            status, private = history.run(run).status, history.run(run).private
            played, told = history.rounds(run), history.spends(run)
        assert status == "completed"
        assert [item.number for item in played] == list(range(1, rounds + 1))
        for site in SITES:
            spends = self.spends(run, site)
            asked = [row.request for row in spends]
            expected = [f"{run}/{number}/{kind}" for number in range(1, rounds + 1) for kind in ("train", "evaluate")]
            assert asked == expected, f"{site}: the ledger has not one spend for each release"
            in_ledger = [(row.round, row.part, row.noise_multiplier, row.sampling_rate, row.steps) for row in spends]
            in_history = [
                (number, item.part, item.noise_multiplier, item.sampling_rate, item.steps)
                for number, item in told
                if item.site == site
            ]
            assert sorted(in_history) == sorted(in_ledger), f"{site}: history and ledger differ"
            for number, item in told:
                if item.site == site and private and number in {1, rounds // 2, rounds}:
                    so_far = [row for row in spends if row.part == item.part and row.round <= number]
                    assert item.epsilon == pytest.approx(epsilon(so_far, item.delta), rel=5e-3)
                    assert item.epsilon <= item.budget
                if item.site == site and not private:
                    assert item.epsilon == math.inf
        newest = [item.checkpoint for item in played][-5:]
        on_disk = {file.name: file for file in (self.run(run) / "checkpoints").iterdir()}
        assert set(on_disk) == {f"{checkpoint.digest}.safetensors" for checkpoint in newest}
        for checkpoint in newest:
            content = on_disk[f"{checkpoint.digest}.safetensors"].read_bytes()
            assert (hashlib.sha256(content).hexdigest(), len(content)) == (checkpoint.digest, checkpoint.bytes)

    def end(self) -> None:
        """End what still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.communicate()


@dataclass(frozen=True)
class LedgerRow:
    """A spend as the ledger's file has it."""

    run: str
    request: str
    round: int
    part: str
    sampling_rate: float
    noise_multiplier: float
    steps: int


def hear_interrupts() -> None:
    """Undo what a shell does to its background jobs, which ignore Ctrl-C, and so would their children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def epsilon(rows: list[LedgerRow], delta: float) -> float:
    """Compose a ledger's rows by privacy-loss distributions, with the library and none of our own code."""
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    steps: Counter[tuple[float, float]] = Counter()
    for row in rows:
        steps[row.sampling_rate, row.noise_multiplier] += row.steps
    for (rate, noise), count in steps.items():
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise)), count)
    return float(accountant.get_epsilon(delta))


def ask(file: Path, query: str, *values: object) -> list[tuple[Any, ...]]:
    """Read a SQLite file that another process writes; nothing where it, or its tables, are not there yet."""
    if not file.exists():
        return []
    connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=5)
    try:
        return connection.execute(query, values).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise
    finally:
        connection.close()


def wait_for(look: Callable[[], Any], what: str, *, every: float = 0.002, patience: float = PATIENCE) -> Any:
    """Look until something is there, and give it."""
    until = time.monotonic() + patience
    while not (found := look()):
        if time.monotonic() > until:
            pytest.fail(f"no {what} within {patience:g} s")
        time.sleep(every)
    return found


def records(count: int, prefix: str, source: random.Random) -> list[dict[str, str]]:
    """Texts that a word count tells apart: three words of their label's kind among a few others."""
    rows = []
    for number in range(count):
        words = source.choices(GOOD if number % 2 else BAD, k=3) + source.choices(FILLING, k=source.randrange(2, 6))
        source.shuffle(words)
        label = "positive" if number % 2 else "negative"
        rows.append({"id": f"{prefix}-{number}", "text": " ".join(words), "label": label})
    return rows


@pytest.fixture
def federation(tmp_path: Path, tiny_model: Path) -> Iterator[Federation]:
    """Give three sites of 60 to 100 records with a tiny model, all of it trained, in a fresh home."""
    source = random.Random(7)  # noqa: S311 - made-up texts
    (tmp_path / "data").mkdir()
    for name, count in {**SITES, "test": 200}.items():
        lines = [json.dumps(row) + "\n" for row in records(count, name, source)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    sites = "".join(f'[[sites]]\nname = "{name}"\nrecords = {count}\n' for name, count in SITES.items())
    (tmp_path / "scenario.toml").write_text(
        f"""
        name = "tiny"
        [model]
        name = "{tiny_model}"
        trainable = "full"
        [task]
        name = "text-classification"
        labels = ["negative", "positive"]
        max_length = 16
        [training]
        rounds = {ROUNDS}
        local_steps = 2
        sampling_rate = 0.5
        clipping_norm = 1.0
        server_learning_rate = 0.01
        [privacy]
        epsilon = 8
        delta = 1e-4
        [federation]
        min_sites = 3
        [data]
        source = "folder"
        folder = "data"
        [policy]
        max_epsilon = 20
        delta = 1e-4
        {sites}""",
        encoding="utf-8",
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MOONFLOWER_", "FLWR_"))},
        "MOONFLOWER_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    made = Federation(tmp_path, environment)
    yield made
    made.end()
