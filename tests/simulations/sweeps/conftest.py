"""Sweeps over the tiny scenario whose runs are entered by hand, as the history would have them, and the command over them."""

import signal
import sys
from datetime import UTC, datetime

import pytest

from server.history.records import Checkpoint, Metric, Round, Spend, Trial
from server.history.store import History
from shared.cli import main
from simulations.sweeps.plan import Plan


class Studied:
    """A sweep in a history, and its runs."""

    def __init__(self, history, plan):
        self.history, self.plan = history, plan
        digest = plan.digest[:8]
        self.id = history.create_sweep(f"tiny-{digest}", name="tiny", plan=plan.as_dict(), version="0").id

    def run(self, cell, seed, scores, *, end="completed", epsilon=1.0, scope="test", **others):
        """Enter a run: `scores` are its accuracy by round, `others` further scores after its last."""
        run = f"tiny-{cell}-{seed}"
        config = self.plan.of(self.plan.cells[cell - 1], seed).run_config()
        self.history.create_run(
            run,
            name="tiny",
            config=config.as_dict(),
            config_digest=config.digest,
            rounds_planned=len(scores),
            private=True,
            version="0",
            trial=Trial(self.id, cell, seed),
        )
        attempt = self.history.start_attempt(run, engine="in-process")
        for number, score in enumerate(scores, 1):
            last = others if number == len(scores) else {}
            metrics = [Metric(scope, None, name, value) for name, value in {"accuracy": score, **last}.items()]
            metrics.append(Metric("validation", "north", "accuracy", 0.1, 0.0, 0.2))  # one site's own
            spend = Spend("north", "tiny.north", "train", epsilon * number / len(scores), 1e-5, 1.0, 0.5, 2, 8.0)
            self.history.commit_round(
                Round(
                    run=run,
                    number=number,
                    attempt=attempt.number,
                    phase="training",
                    started_at=datetime(2026, 3, 1, tzinfo=UTC),
                    seconds=1.5,
                    checkpoint=Checkpoint("0" * 64, 1),
                    metrics=tuple(metrics),
                    spends=(spend,),
                )
            )
        if end is not None:
            self.history.end_attempt(run, attempt.number, end, "the disk is full" if end == "failed" else None)
            self.history.finish_run(run, end, attempt=attempt.number)
        return run


@pytest.fixture
def studied(moonflower_home, tiny_scenario):
    """Make a sweep of the tiny scenario, in the history that the command would use."""
    moonflower_home.mkdir()
    opened = []

    def make(*grid, seeds="3", settings=()):
        opened.append(History.open(f"sqlite:///{moonflower_home / 'history.db'}"))
        return Studied(opened[-1], Plan.make(str(tiny_scenario), settings, grid, seeds, None))

    yield make
    for history in opened:
        history.close()


@pytest.fixture
def moonflower(moonflower_home, monkeypatch, capfd):
    """Run the command line in this process, to its exit code, standard output and standard error."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moonflower", *(str(argument) for argument in arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    yield run
    signal.signal(signal.SIGTERM, handler)
