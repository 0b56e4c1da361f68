"""Databases to test on: SQLite in memory, SQLite in a file, and a real PostgreSQL, each fresh a test.

PostgreSQL itself is in tests/conftest.py.
"""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from server.history.records import Checkpoint, Metric, Participation, Round, Run, Spend
from server.history.store import History

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'history.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_url(request: pytest.FixtureRequest) -> str:
    """Give a fresh database that several processes can open."""
    url: str = request.getfixturevalue({"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param])
    return url


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def history(request: pytest.FixtureRequest) -> Iterator[History]:
    names = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}
    url = request.getfixturevalue(names[request.param]) if request.param in names else "sqlite://"
    with History.open(url) as opened:
        yield opened


@pytest.fixture
def new_run() -> Callable[..., Run]:
    """Enter a run and start its first attempt."""

    def enter(history: History, run_id: str = "lungs-1", *, private: bool = True, start: bool = True) -> Run:
        run = history.create_run(
            run_id,
            name="Lungs",
            config={"privacy": {"epsilon": 8.0 if private else float("inf")}, "sites": ["a", "b"]},
            config_digest="c0ffee",
            rounds_planned=10,
            private=private,
            version="0.1.0",
        )
        if start:
            history.start_attempt(run_id, engine="in-process")
        return run

    return enter


@pytest.fixture
def new_round() -> Callable[..., Round]:
    """Make a round's value, with something in every field."""

    def make(number: int = 1, *, attempt: int = 1, run: str = "lungs-1", epsilon: float | None = None) -> Round:
        spent = number / 2 if epsilon is None else epsilon
        noise = "gaussian", "aes-256-ctr"
        return Round(
            run=run,
            number=number,
            attempt=attempt,
            phase="training",
            started_at=START + timedelta(minutes=number, microseconds=7),
            seconds=12.25,
            checkpoint=Checkpoint(f"{number:064x}", 5_000_000_000),
            participations=(
                Participation("st-marys", "train", "ok", 3.5, 88_000_000, 6_000_000_000),
                Participation("charite", "train", "ok", 4.25, 88_000_000, 88_000_000),
                Participation("aku", "train", "refused", 0.1, 512, 64, error="max_epsilon=8 is spent"),
                Participation("st-marys", "evaluate", "ok", 1.0, 512, 64),
            ),
            metrics=(
                Metric("test", None, "accuracy", 0.5 + number / 100),
                Metric("validation", None, "f1", 0.7, low=0.65, high=0.75),
                Metric("validation", "st-marys", "f1", 0.71, low=0.6, high=0.8),
            ),
            spends=(
                Spend(
                    "st-marys",
                    "scans-2026",
                    "train",
                    spent,
                    1e-5,
                    1.1,
                    0.05,
                    20,
                    8.0,
                    *noise,
                    "one-pass",
                    "ab" * 16,
                    2 * number - 1,
                    "0" * 64,
                ),
                Spend("charite", "ct", "train", spent / 2, 1e-6, 1.2, 0.01, 10, 4.0),
                Spend(
                    "st-marys",
                    "scans-2026",
                    "validation",
                    spent / 4,
                    1e-5,
                    2.0,
                    1.0,
                    1,
                    1.0,
                    *noise,
                    "",
                    "ab" * 16,
                    2 * number,
                    "cd" * 32,
                ),
            ),
        )

    return make
