"""The person as the unit of privacy: sampled, clipped, split and counted as one, whatever records are theirs."""

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from client import answers, data, evaluation, training
from client.data import Parts
from client.privacy.ledger import Ledger
from client.privacy.randomness import Keystream
from client.site import open_ledger, split_key
from client.training import EncoderPass, HeadPass
from shared import examples as shared_examples
from shared import ledger_chain
from shared.errors import ConfigError, DatabaseError, DataError, EngineError, SensitivityError
from shared.tasks.base import Measured

Desks = Callable[..., Any]
Planted = Callable[..., AbstractContextManager[None]]
Rows = Callable[..., list[dict[str, Any]]]
K = 2
PERSONS = 20
OPEN = {"privacy": {"allow_non_private": True}}
INF = {"privacy": {"epsilon": float("inf"), "unit": "person", "records_per_person": K}}
NORM = 0.01


def of_persons(rows: list[dict[str, Any]], persons: int = PERSONS) -> list[dict[str, Any]]:
    """Give each row to a person: they have 1, 2, 3 ... records, as many as there are rows for."""
    owners = [number for number in range(persons) for _ in range(1 + number % 9)]
    return [row | {"who": f"p{owners[number % len(owners)]}"} for number, row in enumerate(rows)]


@pytest.fixture
def people(new_desk: Desks, new_rows: Rows) -> Desks:
    """Make a site of 20 persons with 1 to 9 records each; two of them at most act in a step."""

    def make(name: str = "clinic", persons: int = PERSONS, **changes: Any) -> Any:
        rows = of_persons(new_rows(changes.pop("count", 90)), persons)
        site = {"dataset": {"unit_column": "who", "persons": persons, "records": None, "validation": 0.5}}
        config = {"privacy": {"unit": "person", "records_per_person": K}} | changes.pop("config", {})
        return new_desk(name=name, rows=rows, site=site | changes.pop("site", {}), config=config, **changes)

    return make


def parts(desk: Any) -> Parts:
    found: Parts = desk.resident.parts(desk.site, desk.config)
    return found


def size(update: dict[str, npt.NDArray[np.float32]]) -> float:
    return float(np.linalg.norm(np.concatenate([part.ravel() for part in update.values()])))


# -- sampling ------------------------------------------------------------------------------------------------


class Spy(Keystream):
    """Remembers of how many it was asked to draw."""

    def __init__(self) -> None:
        super().__init__(hashlib.sha256(b"spy").digest())
        self.among: list[int] = []

    def poisson_sample(self, n: int, rate: float) -> npt.NDArray[np.int64]:
        self.among.append(n)
        return super().poisson_sample(n, rate)


def test_a_step_draws_persons_and_not_records(people: Desks) -> None:
    spy = Spy()
    desk = people(randomness=lambda _: spy)
    desk.train()
    held = parts(desk).train
    assert held.rows > len(held)
    assert spy.among == [len(held)] * 2


def test_a_step_takes_at_most_k_records_of_one_person_anew_each_time_and_nobody_elses(
    people: Desks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person of 9 records: over 60 steps each is taken (but for 1e-6), never more than two at once."""
    phase = {"rounds": 1, "sampling_rate": 1.0, "local_steps": 60, "clipping_norm": 1.0}
    desk = people(config={"training": phase} | INF, site=OPEN, randomness=lambda _: Keystream.from_system())
    seen: list[list[int]] = []

    def groups(self: EncoderPass, drawn: Any, *, whole: bool) -> Any:
        seen.extend(list(unit) for unit in drawn)
        yield from ()

    monkeypatch.setattr(EncoderPass, "groups", groups)
    desk.train()
    held = parts(desk).train
    owner = {row: unit for unit in range(len(held)) for row in held.rows_of(unit)}
    assert len(seen) == 60 * len(held)
    assert max(len(rows) for rows in seen) == K
    assert all(len({owner[row] for row in rows}) == 1 and len(set(rows)) == len(rows) for rows in seen)
    assert {row for rows in seen for row in rows} == set(range(held.rows))
    assert all(len(rows) == min(K, len(held.rows_of(owner[rows[0]]))) for rows in seen)


def test_which_records_of_a_person_are_taken_depends_on_no_other_persons_number_of_them(people: Desks) -> None:
    held = parts(people()).train
    unit = max(range(len(held)), key=lambda number: len(held.rows_of(number)))
    times = 4000
    counts: Counter[int] = Counter()
    for _ in range(times):
        counts.update(training._some(held, unit, K, Keystream.from_system()))
    rows = held.rows_of(unit)
    share = K / len(rows)
    assert set(counts) == set(rows)
    assert all(abs(counts[row] - times * share) < 6 * (times * share * (1 - share)) ** 0.5 for row in rows)


# -- clipping ------------------------------------------------------------------------------------------------


def reach_of_a_person(people: Desks, name: str, records: int, **config: Any) -> float:
    """Norm that a site's only person of so many equal records gives the sum, over the clipping norm."""
    phase = {"rounds": 1, "sampling_rate": 1.0, "local_steps": 1, "clipping_norm": NORM}
    many = {"privacy": INF["privacy"] | {"records_per_person": 8}}
    desk = people(name, config={"training": phase} | many | config, site=OPEN)
    key = split_key(desk.site)
    who = next(f"p{n}" for n in range(100) if not data.is_validation(f"p{n}", key, 0.5))
    row = desk.rows()[0] | {"who": who}
    desk.write([row | {"id": f"r{n}", "text": " ".join(["a film is bad"] * (1 + n))} for n in range(records)])
    assert len(parts(desk).train) == 1
    update = desk.train().update
    return size(update) * desk.site.dataset.units / 2 / NORM


HEAD = {"model": {"trainable": "head"}}
DISCRETE = {"privacy": INF["privacy"] | {"records_per_person": 8, "noise": "discrete"}}


@pytest.mark.parametrize("how", [{}, HEAD, DISCRETE], ids=["encoder", "head", "discrete"])
@pytest.mark.parametrize("records", [1, 3, 8])
def test_a_person_moves_the_sum_by_the_clipping_norm_however_many_records_are_theirs(
    people: Desks, records: int, how: dict[str, Any]
) -> None:
    reach = reach_of_a_person(people, "only", records, **how)
    assert 0.9 < reach <= 1.01


def test_rows_that_are_clipped_one_by_one_are_caught(people: Desks, planted: Planted) -> None:
    """As three units of the head's pass, a person of three records would count three times."""
    old = "rows = torch.tensor(units[start : start + HEAD_BATCH], device=self._features.device)"
    new = old.replace("torch.tensor(units[start : start + HEAD_BATCH],", "torch.tensor([r for u in units for r in u],")
    squeezed = new + "; each = 0; rows = rows.unsqueeze(1); each = 1"
    with planted(HeadPass.groups, old, squeezed):
        assert reach_of_a_person(people, "planted", 3, **HEAD) > 2.0


ENCODER = (EncoderPass, "value.flatten(0, 1)", "value.transpose(0, 1).flatten(0, 1)")
HEADS = (HeadPass, "(features.flatten(0, 1), targets", "(features.transpose(0, 1).flatten(0, 1), targets")


@pytest.mark.parametrize(("kind", "old", "new"), [ENCODER, HEADS], ids=["encoder", "head"])
def test_the_probe_finds_rows_of_two_persons_that_are_mixed(
    people: Desks, planted: Planted, kind: Any, old: str, new: str
) -> None:
    desk = people(config=HEAD | INF if kind is HeadPass else {}, site=OPEN)
    with planted(kind._objective, old, new), pytest.raises(SensitivityError, match="probe"):
        desk.train()
    assert desk.spent() == 0


@pytest.mark.parametrize("how", [{}, {"model": {"trainable": "head"}}], ids=["encoder", "head"])
def test_a_persons_gradient_is_the_mean_of_their_records_where_nothing_is_clipped(
    people: Desks, how: dict[str, Any]
) -> None:
    """The sum clips to the same length, so that the probe takes the one for the other."""
    phase = {"rounds": 1, "sampling_rate": 1.0, "local_steps": 1, "clipping_norm": 1e4}
    desk = people(config={"training": phase} | INF | how, site=OPEN)
    key, rows = split_key(desk.site), desk.rows()
    who = next(f"p{n}" for n in range(100) if not data.is_validation(f"p{n}", key, 0.5))
    pair = [row | {"who": who} for row in rows[:2]]
    updates = []
    for number, held in enumerate((pair, pair[:1], pair[1:])):
        desk.write(held)
        updates.append(desk.train(run=f"run-{number}").update)
    both, *each = updates
    for name, update in both.items():
        assert np.allclose(update, (each[0][name] + each[1][name]) / 2, rtol=1e-3, atol=1e-6 * np.abs(update).max())
    assert size(both) > 0


def test_the_probe_finds_a_batch_that_takes_rows_of_other_persons(people: Desks, planted: Planted) -> None:
    old, new = "value.reshape(-1, each, *value.shape[1:])", "value.reshape(each, -1, *value.shape[1:]).transpose(0, 1)"
    desk = people(site=OPEN)
    with planted(shared_examples.collate, old, new), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "collate", shared_examples.collate)
        with pytest.raises(SensitivityError, match="probe"):
            desk.train()
    assert desk.spent() == 0


def test_every_probe_of_a_warm_process_may_meet_units_of_several_rows(people: Desks) -> None:
    desk = people()
    objective = EncoderPass(desk.model, parts(desk).train, desk.config)
    rows = {len(objective.made_up(only_one_batch=True)[0][0][1].inputs[0].shape) for _ in range(60)}
    assert rows == {2, 3}  # (B, T), and (B, rows, T)
    full, alone = objective.made_up()
    assert {tuple(batch.inputs[0].shape[:-1]) for _, batch in full} == {(3,), (2,), (1,), (2, 2)}
    assert len(alone) == sum(len(numbers) for numbers, _ in full)


@pytest.mark.parametrize("method", ["hooks", "ghost"])
def test_methods_of_single_records_are_refused_for_persons_of_several_before_any_work(
    new_config: Callable[..., Any], method: str
) -> None:
    privacy = {"unit": "person", "records_per_person": 2}
    with pytest.raises(ValueError, match=r"hardware\.gradients=.* needs a person's as one"):
        new_config(privacy=privacy, hardware={"gradients": method})
    assert new_config(privacy=privacy | {"records_per_person": 1}, hardware={"gradients": method})


def test_hooks_that_auto_could_fall_back_on_are_refused_by_the_probe(people: Desks) -> None:
    desk = people()
    config = desk.config.model_copy(update={"hardware": desk.config.hardware.model_copy(update={"gradients": "hooks"})})
    desk.config = config  # past the configuration's own check
    with pytest.raises((SensitivityError, ConfigError), match=r"one row a record|needs a person's as one"):
        desk.train()
    assert desk.spent() == 0


# -- split and histogram -------------------------------------------------------------------------------------


def overlap(desk: Any) -> int:
    """Records in training of persons who have others in validation."""
    key, share = split_key(desk.site), 0.5
    held, task = parts(desk), desk.model.task
    count = Counter(record.unit for record in data.read(desk.site.dataset, task))
    kept = {who for who in count if data.is_validation(who, key, share)}
    expected = sum(count[who] for who in kept)
    return abs(held.validation.rows - expected)


def test_a_person_is_in_one_part_with_all_their_records(people: Desks) -> None:
    desk = people()
    held = parts(desk)
    assert overlap(desk) == 0
    assert (len(held.train), len(held.train) + len(held.validation)) < (PERSONS, PERSONS + 1)
    assert held.train.rows + held.validation.rows == 90


def counts_of(desk: Any, number: int = 1) -> float:
    return float(desk.evaluate(number).histogram["counts"].sum())


def test_a_person_adds_one_to_the_histogram_however_many_records_are_theirs(people: Desks) -> None:
    desk = people(config=INF, site=OPEN)
    assert counts_of(desk) == len(parts(desk).validation)


def test_removing_a_person_moves_the_histogram_by_at_most_one(people: Desks) -> None:
    desk = people(config=INF, site=OPEN)
    key = split_key(desk.site)
    before = desk.evaluate(run="before").histogram["counts"]
    rows = desk.rows()
    for number, who in enumerate({row["who"] for row in rows if data.is_validation(row["who"], key, 0.5)}):
        desk.write([row for row in rows if row["who"] != who])
        apart = desk.evaluate(run=f"without-{number}").histogram["counts"] - before
        assert 0 < float(np.linalg.norm(apart)) <= 1 + 1e-6
        assert float(apart.sum()) == -1.0


def test_a_histogram_that_counts_each_row_as_one_is_seen(people: Desks, planted: Planted) -> None:
    desk = people(config=INF, site=OPEN)
    with planted(evaluation._shares, "* STEPS // held", "* STEPS"):
        assert counts_of(desk) == parts(desk).validation.rows > len(parts(desk).validation)


@pytest.mark.parametrize("held", [1, 3, 1000, 70_000])
def test_shares_of_a_persons_records_add_up_to_one_whatever_their_number(people: Desks, held: int) -> None:
    class Held:
        records, units = np.arange(held + 3), np.array([0, held, held + 2])

    shares = evaluation._shares(Held())  # type: ignore[arg-type]
    assert (shares >= 0).all()
    assert [int(part.sum()) for part in (shares[:held], shares[held:])] == [evaluation.STEPS] * 2


# -- who a person is -----------------------------------------------------------------------------------------


def test_a_name_is_one_person_however_it_is_composed(people: Desks) -> None:
    desk = people()
    names = ["Zoe\u0308", "Zo\u00eb", " Zo\u00eb", "Zo\u00eb "]
    desk.write([row | {"who": name} for row, name in zip(desk.rows(), names, strict=False)])
    assert len({record.unit for record in data.read(desk.site.dataset, desk.model.task)}) == 1


@pytest.mark.parametrize("who", [None, "", "  ", 1.5, True])
def test_a_record_of_nobody_is_named_by_its_row(people: Desks, who: Any) -> None:
    desk = people()
    rows = desk.rows()
    desk.write([*rows[:4], rows[4] | {"who": who}, *rows[5:]])
    with pytest.raises(DataError, match=r"row 5.*who"):
        list(data.read(desk.site.dataset, desk.model.task))


# -- the unit is one for a dataset's life --------------------------------------------------------------------


def test_a_site_of_persons_refuses_a_run_for_records_before_any_work(people: Desks, new_desk: Desks) -> None:
    desk = people(config={"privacy": {"unit": "record", "records_per_person": None}})
    with pytest.raises(
        ConfigError, match=r"privacy\.unit='record'.*the person as its unit.*set privacy\.unit='person'"
    ):
        answers.answer(desk.resident, desk.site, "join", join(desk), desk.randomness)
    other = new_desk(name="other", config={"privacy": {"unit": "person", "records_per_person": 1}})
    with pytest.raises(ConfigError, match=r"privacy\.unit='person'.*names no column.*set privacy\.unit='record'"):
        answers.answer(other.resident, other.site, "join", join(other), other.randomness)
    assert desk.resident._model is other.resident._model is None
    assert not desk.site.ledger.exists()


def join(desk: Any) -> Any:
    from shared.messages import JoinRequest

    return JoinRequest("run", desk.config.as_json(), "0" * 64, "{}")


def test_the_reply_to_joining_says_whom_the_promise_is_made_to_and_how_many_there_are(people: Desks) -> None:
    reply = people().join()
    assert (reply.unit, reply.records) == ("person", PERSONS)


def test_an_account_of_persons_takes_no_run_for_records_nor_the_other_way_round(people: Desks, new_desk: Desks) -> None:
    desk = people()
    desk.train()
    records = {"unit_column": None, "persons": None, "records": 90}
    changed = desk.site.dataset.model_copy(update=records)
    now = desk.site.model_copy(update={"dataset": changed})
    with pytest.raises(ConfigError, match="opened with the person as the unit of privacy"):
        open_ledger(now)
    other = new_desk(name="other")
    other.train()
    changed = other.site.dataset.model_copy(update={"unit_column": "label", "persons": 20, "records": None})
    with pytest.raises(ConfigError, match="opened with the record as the unit of privacy"):
        open_ledger(other.site.model_copy(update={"dataset": changed}))


def test_another_column_of_persons_is_refused_for_the_datasets_life(people: Desks) -> None:
    desk = people()
    desk.train()
    changed = desk.site.dataset.model_copy(update={"unit_column": "label"})
    desk.site = desk.site.model_copy(update={"dataset": changed})
    with pytest.raises(DataError, match="unit column"):
        desk.train(2)


# -- what a task may not do to the counts --------------------------------------------------------------------

ONE = np.full(1, evaluation.STEPS)


@pytest.mark.parametrize(
    ("cells", "amounts", "fault"),
    [
        ([[0, 7]], [[1.0, 1.0]], "cell that its counts do not have"),
        ([[-1, 3]], [[1.0, 1.0]], "cell that its counts do not have"),  # -1 is 3 to numpy
        ([[2, 2]], [[1.0, 1.0]], "twice"),
        ([[0, 1, 2]], [[1.0]], "measures 1 records"),  # numpy would put the one amount into all three
        ([[0], [1]], [[1.0], [1.0]], "measures 1 records"),
    ],
)
def test_counts_that_a_task_gets_wrong_are_refused(desk: Any, cells: Any, amounts: Any, fault: str) -> None:
    total = np.zeros(4, dtype=np.int64)
    with pytest.raises(EngineError, match=fault):
        evaluation._add(total, Measured(np.array(cells), np.array(amounts)), ONE, desk.model.task)
    assert not total.any()


@pytest.mark.parametrize("amounts", [[1.0, 1.0], [1e200, -1e200], [np.nan, 5.0], [np.inf, 1.0], [1e-320, 0.0]])
def test_a_records_vector_is_clipped_whatever_a_task_makes_of_it(desk: Any, amounts: list[float]) -> None:
    total = np.zeros(4, dtype=np.int64)
    evaluation._add(total, Measured(np.array([[0, 1]]), np.array([amounts])), ONE, desk.model.task)
    assert float(np.linalg.norm(total)) <= evaluation.STEPS * desk.model.task.sensitivity


def test_an_evaluation_is_refused_where_a_network_scores_a_record_by_its_neighbours(
    people: Desks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where features are kept, they are probed; where none are, nothing but this stands before the histogram."""
    desk = people()
    monkeypatch.setattr(type(desk.model.task), "features", False)
    assert desk.evaluate(1).histogram["counts"].size
    forward = desk.model.module.forward

    def coupled(*given: Any, **named: Any) -> torch.Tensor:
        outputs: torch.Tensor = forward(*given, **named)
        return outputs - outputs.mean(0)

    monkeypatch.setattr(desk.model.module, "forward", coupled)
    with pytest.raises(SensitivityError, match="with the records beside it"):
        desk.evaluate(2, run="other")
    assert desk.spent() == 1


# -- the ledger ----------------------------------------------------------------------------------------------


def test_a_ledger_says_whose_it_is_and_every_event_is_bound_to_it(people: Desks, new_desk: Desks) -> None:
    desk, other = people(), new_desk(name="other")
    for each in (desk, other):
        each.train()
    with desk.ledger() as ledger, other.ledger() as of_records:
        export, records = ledger.export(), of_records.export()
    assert ledger_chain.verify(export) is ledger_chain.verify(records) is None
    assert [ledger_chain.unit_of(each["dataset"]) for each in (export, records)] == ["person", "record"]
    assert "unit" not in records["dataset"]  # as it was before there were persons: digests are the same as ever
    taken = {name: value for name, value in export["dataset"].items() if name != "unit"}
    for header, held in ((taken, export), (records["dataset"] | {"unit": "person"}, records)):
        fault = ledger_chain.verify(held | {"dataset": header})
        assert fault is not None
        assert fault.kind == "edited"
    fault = ledger_chain.verify(export | {"dataset": taken | {"unit": "household"}})
    assert fault is not None
    assert fault.kind == "malformed"


def test_a_ledger_that_has_lost_its_unit_is_broken(people: Desks) -> None:
    desk = people()
    desk.train()
    with closing(sqlite3.connect(desk.site.ledger)) as connection, connection:
        assert connection.execute("DELETE FROM states WHERE kind = 'unit'").rowcount == 1
    with pytest.raises(ConfigError, match="opened with the record"):
        desk.train(2)
    path, dataset = desk.site.ledger, desk.site.dataset.id
    with (
        pytest.raises(DatabaseError, match="was edited"),
        Ledger.open(path, dataset=dataset, delta=1e-3, max_epsilon=9.0),
    ):
        pass


# -- bugs, planted: each is seen by the test that stands for it ----------------------------------------------


def test_a_bound_that_the_site_does_not_keep_is_caught(
    people: Desks, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    with planted(training._some, "len(records) <= most", "most"), pytest.raises(AssertionError):
        test_a_step_takes_at_most_k_records_of_one_person_anew_each_time_and_nobody_elses(people, monkeypatch)


def test_records_of_other_persons_in_a_step_are_caught(
    people: Desks, planted: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = "examples.of_record(records[record])", "examples.of_record((records[record] + 1) % examples.rows)"
    with planted(training._some, old, new), pytest.raises(AssertionError):
        test_a_step_takes_at_most_k_records_of_one_person_anew_each_time_and_nobody_elses(people, monkeypatch)


def test_a_step_that_draws_records_is_caught(people: Desks, planted: Planted) -> None:
    old = "randomness.poisson_sample(len(examples), steps.sampling_rate)"
    new = "(randomness.poisson_sample(examples.rows, steps.sampling_rate) % len(examples))"
    with planted(training.train, old, new), pytest.raises(AssertionError):
        test_a_step_draws_persons_and_not_records(people)


def test_a_split_by_records_is_caught(people: Desks, planted: Planted) -> None:
    """A person would lie in both parts, and pay in one."""
    with planted(data._encode, "is_validation(record.unit,", "is_validation(record.id,"), pytest.raises(AssertionError):
        test_a_person_is_in_one_part_with_all_their_records(people)
