"""Many sites of one pool: each answers from its own records and its own account, whatever the others do."""

from pathlib import Path
from typing import Any

import numpy as np
import pools
import pytest
from flwr.app import Context, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from client import data
from client.privacy.account import Account
from client.privacy.events import Question
from client.site import open_ledger
from server import job
from server.history.store import History
from shared import models
from shared.accounting import Release
from shared.errors import BudgetError, ConfigError, DatabaseError, DataError
from shared.examples import Examples
from simulations import engine, nodes, pool, prepare
from simulations.pool import Pool, PoolResident


@pytest.fixture
def laid_out(tmp_path: Path, tiny_model: Path, moonflower_home: Path) -> tuple[str, Pool]:
    run = pools.lay_out(tmp_path, tiny_model)
    return run, Pool(prepare.run_folder(run) / pool.FOLDER)


def words(examples: Examples) -> list[list[int]]:
    """What a part's records read, in order."""
    return sorted(examples.row(row)["input_ids"].tolist() for row in range(examples.rows))


def test_a_sites_records_are_its_rows_of_the_pool_each_in_its_part(laid_out: tuple[str, Pool], tmp_path: Path) -> None:
    run, held = laid_out
    config = job.load(prepare.run_folder(run)).config
    resident, model = PoolResident(), models.load(config)
    records = list(data.read(held.whole.dataset, model.task))
    key = (held.folder / "split.key").read_bytes()
    seen = 0
    for number in range(len(held)):
        parts = resident.parts(held.site(number), config)
        mine = [records[row] for row in held.assignment.rows(number)]
        for examples, validation in ((parts.train, False), (parts.validation, True)):
            due = [each for each in mine if data.is_validation(each.unit, key, 0.3) == validation]
            expected = sorted(model.task.encode(each.values, model.processor)["input_ids"].tolist() for each in due)
            assert words(examples) == expected
            seen += len(due)
    assert seen == 360


def test_a_person_is_at_one_site_with_all_their_records(
    tmp_path: Path, tiny_model: Path, moonflower_home: Path
) -> None:
    run = pools.lay_out(
        tmp_path,
        tiny_model,
        records=960,
        data={"unit_column": "who"},
        privacy={"unit": "person", "records_per_person": 2},
    )
    held = Pool(prepare.run_folder(run) / pool.FOLDER)
    config, resident = job.load(prepare.run_folder(run)).config, PoolResident()
    people = 0
    for number in range(len(held)):
        parts = resident.parts(held.site(number), config)
        for examples in (parts.train, parts.validation):
            assert {len(examples.records_of(unit)) for unit in range(len(examples))} == {4}
            people += len(examples)
    assert people == 240
    assert held.site(0).dataset.card().unit == "person"


def test_a_whole_run_leaves_an_account_a_site_in_the_studys_ledger(
    tmp_path: Path, laid_out: tuple[str, Pool], moonflower_home: Path
) -> None:
    run, held = laid_out
    engine.play(run, pools.history_of(tmp_path), None)
    for number in (0, len(held) - 1):
        with PoolResident().ledger(held.site(number)) as ledger:
            kinds = [(spend.question.kind, spend.question.round) for spend in ledger.spends()]
        assert kinds == [(kind, number) for number in (1, 2, 3) for kind in ("train", "evaluate")]
    with History.open(pools.history_of(tmp_path)) as history:
        assert history.run(run).status == "completed"
        assert len(history.spends(run)) == 2 * 3 * pools.SITES
        seen = history.ledgers()
        assert {ledger.number for ledger in seen.values()} == {6}
        assert len(seen) == pools.SITES
    assert not list(prepare.run_folder(run).glob("sites"))  # no folder a site


def test_a_site_of_a_pool_is_refused_what_its_budget_does_not_hold(laid_out: tuple[str, Pool]) -> None:
    _, held = laid_out
    resident = PoolResident()
    with resident.ledger(held.site(0)) as ledger:
        question = Question("run", "run/1/train", "0" * 64, 1, "train", "train")
        release = Release(1.0, 0.05, 1)
        with pytest.raises(BudgetError, match="above the limit of 50"), ledger.reserve(question, release):
            raise AssertionError("it was reserved")
        with pytest.raises(BudgetError, match="above the limit of 50"):
            ledger.charge(question, release, lambda number, head: b"reply")
        assert ledger.charge(question, Release(1.0, 5.0, 1), lambda number, head: b"reply") == b"reply"
        assert ledger.recall(question) == b"reply"
    with resident.ledger(held.site(1)) as other:
        assert other.spends() == []
        assert other.account != ledger.account


def test_nothing_is_stated_of_a_studys_ledger_nor_may_a_real_site_use_it(laid_out: tuple[str, Pool]) -> None:
    _, held = laid_out
    own = held.site(0)
    PoolResident().ledger(own)
    with pytest.raises(DatabaseError, match="is a simulated study's: no promise rests on it"):
        Account.read(own.ledger, own.dataset.id)
    with pytest.raises(DatabaseError, match="is a simulated study's: no promise rests on it"):
        open_ledger(own)


def test_two_processes_that_answer_one_question_charge_it_once(laid_out: tuple[str, Pool]) -> None:
    _, held = laid_out
    question, release = Question("run", "run/1/train", "0" * 64, 1, "train", "train"), Release(1.0, 5.0, 1)
    with PoolResident().ledger(held.site(0)) as first, PoolResident().ledger(held.site(0)) as second:
        assert first.charge(question, release, lambda number, head: b"first") == b"first"
        assert second.charge(question, release, lambda number, head: b"second") == b"first"
        assert len(second.spends()) == len(first.spends()) == 1


def test_a_node_finds_its_site_in_the_pool(laid_out: tuple[str, Pool]) -> None:
    run, held = laid_out
    found = prepare.nodes(run)
    assert list(found) == list(range(1, pools.SITES + 1))
    context = Context(1, 5, dict(found[5]), state=RecordDict(), run_config={})
    assert nodes.site_from_context(context) == held.site(4)
    under_ray = Context(1, 7, {"partition-id": 4}, state=RecordDict(), run_config={"run": str(prepare.run_folder(run))})
    assert nodes.site_from_context(under_ray) == held.site(4)
    with pytest.raises(KeyError):
        found[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"partition": {"sites": 40}}, "partition.sites=40"),
        ({"training": {"batch_size": 5000, "sampling_rate": None}}, "training.batch_size=5000"),
        ({"policy": {"max_epsilon": 0.5}}, r"\[policy\]"),
        ({"task": {"labels": ["negative", "neutral"]}}, "label"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_left_behind(
    settings: Any, said: str, tmp_path: Path, tiny_model: Path, moonflower_home: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=said):
        pools.lay_out(tmp_path, tiny_model, **settings)
    assert not list((moonflower_home / "runs").glob("*"))
    with History.open(pools.history_of(tmp_path)) as history:
        assert history.runs() == []


@given(st.data())
def test_units_taken_from_a_part_are_those_that_were_named(draw: Any) -> None:
    rows = draw.draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=6))
    chunked = draw.draw(st.booleans())
    number, units = 0, []
    for unit in rows:  # of how many chunks each of its records has
        records = []
        for chunks in unit:
            made = []
            for _ in range(chunks if chunked else 1):
                number += 1
                ids = np.full(draw.draw(st.integers(0, 4)), number, np.int32)
                made.append({"ids": ids, "label": np.asarray(number)})
            records.append(made if chunked else made[0])
        units.append(records)
    task: Any = type("Chunked", (), {"chunks": True, "name": "chunked"})()
    whole = Examples.of(task, None, units)
    chosen = draw.draw(st.lists(st.integers(0, len(units) - 1), unique=True))
    taken = whole.take(np.array(chosen, np.int64))
    assert len(taken) == len(chosen)
    for place, unit_number in enumerate(chosen):
        ours, theirs = taken.rows_of(place), whole.rows_of(unit_number)
        assert len(taken.records_of(place)) == len(whole.records_of(unit_number))
        assert len(ours) == len(theirs)
        for our, their in zip(ours, theirs, strict=True):
            assert taken.row(our)["ids"].tolist() == whole.row(their)["ids"].tolist()
            assert taken.row(our)["label"] == whole.row(their)["label"]
        ends = [len(whole.of_record(record)) for record in whole.records_of(unit_number)]
        assert [len(taken.of_record(record)) for record in taken.records_of(place)] == ends
