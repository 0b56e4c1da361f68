"""Write `history-REVISION.db`, a small history of the newest revision, beside this file.

Run it once when a revision is added, and keep the file for good: the tests upgrade each past one.

    python tests/assets/make_history.py
"""

from datetime import UTC, datetime
from pathlib import Path

from server.history.records import Checkpoint, Ledger, Metric, Participation, Round, Spend, Trial
from server.history.schema import NEWEST
from server.history.store import History


def round_of(run: str, number: int, attempt: int, *, epsilon: float) -> Round:
    """Make a round with a site that trained, one that refused, two scores and two spends."""
    noise = "gaussian", "aes-256-ctr"
    ledgers = [("ab" * 16, event, f"{event - 1:064x}") for event in (2 * number - 1, 2 * number)]
    return Round(
        run=run,
        number=number,
        attempt=attempt,
        phase="training",
        started_at=datetime(2026, 3, 1, 12, number, tzinfo=UTC),
        seconds=61.5,
        checkpoint=Checkpoint(f"{number:064x}", 88_000_000),
        participations=(
            Participation("st-marys", "train", "ok", 40.0, 88_000_000, 88_000_000),
            Participation("aku", "train", "refused", 0.1, 512, 64, error="max_epsilon=8 is spent"),
        ),
        metrics=(
            Metric("test", None, "accuracy", 0.5 + number / 10),
            Metric("validation", "st-marys", "f1", 0.7, low=0.65, high=0.75),
        ),
        spends=(
            Spend("st-marys", "scans-2026", "train", epsilon, 1e-5, 1.1, 0.05, 20, 8.0, *noise, "hooks", *ledgers[0]),
            Spend("st-marys", "scans-2026", "validation", epsilon / 2, 1e-5, 2.0, 1.0, 1, 1.0, *noise, "", *ledgers[1]),
        ),
    )


def main() -> None:
    """Write the file."""
    file = Path(__file__).with_name(f"history-{NEWEST}.db")
    file.unlink(missing_ok=True)
    with History.open(f"sqlite:///{file}") as history:
        history.create_sweep("lungs-5ca1e", name="lungs", plan={"grid": {"privacy.epsilon": [8.0]}}, version="0.1.0")
        for run, epsilon in [("lungs-1", 8.0), ("open-2", float("inf"))]:
            history.create_run(
                run,
                name=run.title(),
                config={"privacy": {"epsilon": epsilon}},
                config_digest="c0ffee",
                rounds_planned=3,
                private=run == "lungs-1",
                version="0.1.0",
                trial=Trial("lungs-5ca1e", 1, 7) if run == "open-2" else None,
            )
            history.start_attempt(run, engine="in-process")
            history.commit_round(round_of(run, 1, 1, epsilon=epsilon / 16))
        history.start_attempt("lungs-1", engine="flower")
        history.commit_round(round_of("lungs-1", 2, 2, epsilon=1.0))
        history.commit_round(round_of("lungs-1", 3, 2, epsilon=1.5))
        history.saw_ledgers([Ledger("ab" * 16, "st-marys", "scans-2026", 6, simulated=False, run="lungs-1")])
        history.end_attempt("lungs-1", 2, "completed")
        history.finish_run("lungs-1", "completed")
        history.enrol("st-marys", "ecdsa-sha2-nistp384 AAAAold")
        history.enrol("st-marys", "ecdsa-sha2-nistp384 AAAAnew", renew=True)
        history.set_node("ecdsa-sha2-nistp384 AAAAnew", 2**64 - 1)
        history.add_progress("lungs-1", 3, "train", "aku", "refused", "max_epsilon=8 is spent")


if __name__ == "__main__":
    main()
