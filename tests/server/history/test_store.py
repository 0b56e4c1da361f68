"""What every history keeps, on SQLite in memory, SQLite in a file, and PostgreSQL."""

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy import Engine, event, text

from server.history.records import Ledger, Metric, Participation
from shared.errors import ConfigError, DatabaseError, NotFoundError, RunFailedError

TABLES = ["rounds", "checkpoints", "participations", "metrics", "spends"]


def counts(history):
    with history._session() as session:
        return [session.scalar(text(f"SELECT count(*) FROM {table}")) for table in TABLES]  # noqa: S608


def test_a_run_reads_back_as_entered(history, new_run):
    before = datetime.now(UTC)
    run = new_run(history, start=False)
    assert run == history.run("lungs-1")
    assert (run.status, run.rounds_done, run.rounds_planned, run.finished_at) == ("pending", 0, 10, None)
    assert run.config == {"privacy": {"epsilon": 8.0}, "sites": ["a", "b"]}
    assert before <= run.created_at <= datetime.now(UTC)
    assert run.created_at.utcoffset() == timedelta(0)


def test_a_round_reads_back_equal_to_the_one_committed(history, new_run, new_round):
    new_run(history)
    history.commit_round(new_round(1))
    history.commit_round(new_round(2))
    assert history.last_round("lungs-1") == new_round(2)
    assert history.run("lungs-1").rounds_done == 2


def test_a_run_without_rounds_has_no_last_round(history, new_run):
    new_run(history)
    assert history.last_round("lungs-1") is None


def test_rounds_come_in_order_and_without_their_parts(history, new_run, new_round):
    new_run(history)
    for number in range(1, 5):
        history.commit_round(new_round(number))
    bare = [replace(new_round(n), participations=(), metrics=(), spends=()) for n in range(1, 5)]
    assert history.rounds("lungs-1") == bare
    assert history.rounds("lungs-1", limit=2) == bare[2:]
    assert history.rounds("lungs-1", round_number=3) == bare[2:3]


@pytest.mark.parametrize("kind", ["participations", "metrics", "spends"])
def test_parts_come_with_their_round_and_obey_site_round_and_limit(history, new_run, new_round, kind):
    new_run(history)
    for number in range(1, 4):
        history.commit_round(new_round(number))
    everything = [(n, part) for n in range(1, 4) for part in getattr(new_round(n), kind)]
    read = getattr(history, kind)
    assert read("lungs-1") == everything
    assert read("lungs-1", limit=4) == everything[-4:]
    assert read("lungs-1", round_number=2) == [pair for pair in everything if pair[0] == 2]
    assert read("lungs-1", site="st-marys") == [p for p in everything if p[1].site == "st-marys"]
    assert read("lungs-1", site="nobody") == []


def test_the_bytes_of_a_round_are_summed_over_its_sites(history, new_run, new_round):
    new_run(history), new_run(history, "other")
    history.commit_round(new_round(1)), history.commit_round(new_round(2))
    history.commit_round(replace(new_round(1, run="other"), participations=()))
    parts = new_round(1).participations
    each = sum(part.bytes_up for part in parts), sum(part.bytes_down for part in parts)
    assert history.traffic("lungs-1") == {1: each, 2: each}
    assert history.traffic("other") == {}


def test_runs_keep_their_rounds_apart(history, new_run, new_round):
    new_run(history, "one")
    new_run(history, "two")
    history.commit_round(new_round(1, run="one"))
    history.commit_round(new_round(1, run="two"))
    history.commit_round(new_round(2, run="two"))
    assert history.run("one").rounds_done == 1
    assert [number for number, _ in history.spends("two")] == [1, 1, 1, 2, 2, 2]


def test_runs_are_listed_newest_first(history, new_run):
    for name in ["b", "c", "a"]:
        new_run(history, name, start=False)
    assert [run.id for run in history.runs()] == ["a", "c", "b"]
    assert [run.id for run in history.runs(limit=1)] == ["a"]


def test_a_taken_run_id_is_refused(history, new_run):
    first = new_run(history, start=False)
    with pytest.raises(ConfigError, match="'lungs-1' is taken; resume"):
        history.create_run(
            "lungs-1", name="x", config={}, config_digest="", rounds_planned=1, private=True, version="0"
        )
    assert history.runs() == [first]


def test_a_run_is_found_by_the_beginning_of_its_id_if_no_other_fits(history, new_run):
    for name in ["heart-1", "heart-10", "h%_x", "Lungs-2"]:
        new_run(history, name, start=False)
    assert history.run("heart-1").id == "heart-1"  # the whole id wins over a longer one
    assert history.run("heart-10").id == "heart-10"
    assert history.run("h%").id == "h%_x"
    assert history.run("Lungs").id == "Lungs-2"
    with pytest.raises(NotFoundError, match=r"begin with 'heart' \(heart-1, heart-10\); give more"):
        history.run("heart")
    for unknown in ["lungs", "h_", "", "zebra"]:
        with pytest.raises(NotFoundError, match=f"no run '{unknown}' here; `moonflower history runs`"):
            history.run(unknown)
    with pytest.raises(NotFoundError):
        history.metrics("zebra")


@pytest.mark.parametrize("epsilon", [math.inf, 0.0, 1e-300])
def test_any_epsilon_survives_the_database(history, new_run, new_round, epsilon):
    run = new_run(history, private=False)
    history.commit_round(new_round(1, epsilon=epsilon))
    assert history.last_round("lungs-1").spends[0].epsilon == epsilon
    assert history.run("lungs-1").config["privacy"]["epsilon"] == run.config["privacy"]["epsilon"] == math.inf


def test_a_diverged_loss_does_not_stop_a_round(history, new_run, new_round):
    new_run(history)
    history.commit_round(replace(new_round(1), metrics=(Metric("test", None, "loss", math.nan),)))
    (score,) = history.last_round("lungs-1").metrics
    assert math.isnan(score.value)
    assert score.low is None


def test_a_round_may_have_no_parts(history, new_run, new_round):
    new_run(history)
    bare = replace(new_round(1), participations=(), metrics=(), spends=())
    history.commit_round(bare)
    assert history.last_round("lungs-1") == bare


def test_no_text_from_a_site_can_stop_a_round(history, new_run, new_round):
    new_run(history)
    hostile = "\0 \ud800 '; DROP TABLE runs; --"
    bad = Participation("aku", "train", "failed", 1.0, 0, 0, error=hostile)
    history.commit_round(replace(new_round(1), participations=(bad,)))
    history.add_event("lungs-1", "error", hostile)
    kept = history.last_round("lungs-1").participations[0].error
    assert kept.startswith("\ufffd")
    assert kept.endswith("'; DROP TABLE runs; --")
    assert history.events("lungs-1")[-1].text == kept


def test_times_of_any_zone_come_back_as_the_same_instant_in_utc(history, new_run, new_round):
    new_run(history)
    there = datetime(2026, 7, 1, 0, 30, 0, 123456, tzinfo=timezone(timedelta(hours=5, minutes=30)))
    history.commit_round(replace(new_round(1), started_at=there))
    back = history.last_round("lungs-1").started_at
    assert back == there
    assert back.tzinfo is UTC


def test_a_time_without_a_zone_is_refused(history, new_run, new_round):
    new_run(history)
    with pytest.raises(DatabaseError, match="no time zone"):
        history.commit_round(replace(new_round(1), started_at=datetime(2026, 7, 1)))  # noqa: DTZ001
    assert counts(history) == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("number", [0, 1, 3, 7])
def test_only_the_next_round_is_taken(history, new_run, new_round, number):
    new_run(history)
    history.commit_round(new_round(1))
    before = counts(history)
    with pytest.raises(RunFailedError, match=f"Round {number} of run 'lungs-1'.* round 2 is the next"):
        history.commit_round(new_round(number))
    assert counts(history) == before


@pytest.mark.parametrize("table", TABLES)
def test_a_failure_at_any_statement_of_a_commit_leaves_nothing(history, new_run, new_round, table):
    new_run(history)
    history.commit_round(new_round(1))
    before = counts(history)

    def fail(connection, cursor, statement, *_):
        if statement.startswith(f"INSERT INTO {table} "):
            raise KeyboardInterrupt

    event.listen(Engine, "after_cursor_execute", fail)
    try:
        with pytest.raises(KeyboardInterrupt):
            history.commit_round(new_round(2))
    finally:
        event.remove(Engine, "after_cursor_execute", fail)
    assert counts(history) == before
    history.commit_round(new_round(2))
    assert history.last_round("lungs-1") == new_round(2)


@pytest.mark.parametrize("kind", ["participations", "metrics", "spends"])
def test_the_same_part_twice_is_refused_whole(history, new_run, new_round, kind):
    new_run(history)
    parts = getattr(new_round(1), kind)
    with pytest.raises(DatabaseError, match=r"(?i)unique"):
        history.commit_round(replace(new_round(1), **{kind: (*parts, parts[0])}))
    assert counts(history) == [0, 0, 0, 0, 0]


def test_an_error_inside_a_session_undoes_it(history, new_run):
    new_run(history, start=False)

    def half():
        with history._session(writing=True) as session:
            session.execute(text("UPDATE runs SET status = 'completed'"))
            session.execute(text("SELECT * FROM no_such_table"))

    with pytest.raises(DatabaseError):
        half()
    assert history.run("lungs-1").status == "pending"


def test_an_event_needs_a_run(history):
    with pytest.raises(NotFoundError):
        history.add_event("nobody", "info", "hello")


def test_of_a_ledger_the_furthest_sight_is_remembered_whichever_comes_last(history, new_run):
    new_run(history)
    seen = Ledger("ab" * 16, "st-marys", "scans-2026", 4, simulated=False, run="lungs-1")
    history.saw_ledgers([seen])
    history.saw_ledgers([replace(seen, number=7), replace(seen, id="cd" * 16, number=0)])
    history.saw_ledgers([replace(seen, number=5)])
    assert {key: ledger.number for key, ledger in history.ledgers().items()} == {"ab" * 16: 7, "cd" * 16: 0}


def test_of_sights_as_far_as_each_other_the_last_is_remembered(history, new_run):
    for run in ("lungs-1", "lungs-2"):
        new_run(history, run)
        history.saw_ledgers([Ledger("ab" * 16, "st-marys", "scans-2026", 4, simulated=False, run=run)])
    assert history.ledgers()["ab" * 16].run == "lungs-2"


def test_a_ledgers_number_is_found_by_the_spend_that_has_it(history, new_run, new_round):
    new_run(history)
    history.commit_round(new_round(1))
    history.commit_round(new_round(2))
    assert history.charged("ab" * 16, 4) == ("lungs-1", 2, "validation")
    assert history.charged("ab" * 16, 5) is None
    assert history.charged("ef" * 16, 4) is None
