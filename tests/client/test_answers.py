"""What a site does with a request, asked as a hostile coordinator would ask: for a second copy, less noise, text."""

import json
import math
import os
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kept import tokens

from client.privacy.randomness import Keystream
from shared import accounting, messages
from shared.errors import (
    ConfigError,
    DatabaseError,
    DataError,
    MoonflowerError,
    PolicyError,
    RefusedError,
    RetryError,
)
from shared.run_config import RunConfig
from shared.tasks.text_classification import TextClassification

Desks = Callable[..., Any]


def same(first: Any, second: Any) -> bool:
    return messages.to_bytes(first) == messages.to_bytes(second)


def system(_: str) -> Keystream:
    return Keystream.from_system()


# -- charge first, then release -----------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["spends", "replies"])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_nothing_is_returned_where_the_ledger_cannot_commit(desk: Any, table: str, kind: str) -> None:
    desk.join()
    full = (
        f"CREATE TRIGGER full_disk BEFORE INSERT ON {table} BEGIN SELECT RAISE (FAIL, 'database or disk is full'); END"
    )
    with sqlite3.connect(desk.site.ledger) as connection:
        connection.execute(full)
    connection.close()
    with pytest.raises(DatabaseError, match="disk is full"):
        getattr(desk, kind)()
    assert desk.spent() == 0
    with sqlite3.connect(desk.site.ledger) as connection:
        connection.execute("DROP TRIGGER full_disk")
    connection.close()
    getattr(desk, kind)()
    assert desk.spent() == 1


def test_nothing_is_returned_where_the_ledger_is_no_file_that_can_be_written(desk: Any) -> None:
    desk.site.ledger.mkdir()
    for ask in (desk.join, desk.train, desk.evaluate):
        with pytest.raises(DatabaseError):
            ask()


def test_the_charge_is_on_disk_before_the_answer_is_there(desk: Any) -> None:
    reply = desk.train()
    connection = sqlite3.connect(desk.site.ledger)
    kept = connection.execute("SELECT reply FROM replies").fetchall()
    spends = connection.execute("SELECT noise_multiplier, sampling_rate, steps FROM spends").fetchall()
    connection.close()
    assert kept == [(messages.to_bytes(reply),)]
    assert spends == [(reply.noise_multiplier, reply.sampling_rate, reply.steps)]


# -- retries: one answer, once -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_retry_gets_the_same_bytes_and_spends_once(new_desk: Desks, kind: str) -> None:
    desk = new_desk(randomness=system)
    first = getattr(desk, kind)()
    assert same(first, getattr(desk, kind)())
    desk.resident.__init__()  # as after a restart: nothing is warm
    desk.site.dataset.path.unlink()  # nothing is computed again: no record is needed
    assert same(first, getattr(desk, kind)())
    assert desk.spent() == 1


def test_two_sites_or_two_runs_with_the_same_seed_differ_in_their_noise(new_desk: Desks) -> None:
    desk = new_desk(randomness=system)
    first, second = desk.train(run="first"), desk.train(run="second")
    assert not np.array_equal(first.update["head.weight"], second.update["head.weight"])
    counts = [desk.evaluate(run=run).histogram["counts"] for run in ("first", "second")]
    assert not np.array_equal(counts[0], counts[1])
    other = new_desk(name="other", randomness=system).train(run="first")
    assert not np.array_equal(first.update["head.weight"], other.update["head.weight"])


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_other_arrays_under_the_same_id_are_refused(desk: Any, kind: str) -> None:
    getattr(desk, kind)()
    arrays = desk.start()
    name = next(iter(arrays))
    arrays[name] = arrays[name] + np.float32(1e-6)
    with pytest.raises(RetryError, match="under an id of its own"):
        getattr(desk, kind)(arrays=arrays)
    assert desk.spent() == 1


def test_a_superseded_round_is_refused_answered_or_not(desk: Any) -> None:
    desk.train(2)
    for number in (1,):
        with pytest.raises(RetryError, match="superseded"):
            desk.train(number)
    desk.train(3)
    with pytest.raises(RetryError, match="superseded"):
        desk.train(2)
    assert desk.spent() == 2


def test_a_round_outside_the_plan_is_refused(desk: Any) -> None:
    for number in (0, -1, 4, 2**40):
        for ask in (desk.train, desk.evaluate):
            with pytest.raises(RefusedError, match="outside the run's 3 rounds"):
                ask(number)
    assert desk.spent() == 0


def test_only_the_planned_rounds_are_evaluated(new_desk: Desks) -> None:
    desk = new_desk(config={"evaluation": {"every": 2}})
    desk.evaluate(2)
    with pytest.raises(RefusedError, match="not one that the run's configuration evaluates"):
        new_desk(name="other", config={"evaluation": {"every": 2}}).evaluate(1)
    desk.evaluate(3)  # the last always is
    assert desk.spent() == 2


@pytest.mark.parametrize("first", ["train", "evaluate"])
def test_another_configuration_under_a_runs_name_is_refused(
    desk: Any, new_config: Callable[..., RunConfig], first: str
) -> None:
    getattr(desk, first)()
    arrays = desk.start()
    for changes in (
        {"seed": 1},
        {"training": {"rounds": 4}},
        {"training": {"sampling_rate": 0.25}},
        {"training": {"clipping_norm": 0.5}},
        {"privacy": {"epsilon": 4.0}},
        {"hardware": {"micro_batch": 2}},
    ):
        desk.config = new_config(**changes)
        for ask in (desk.train, desk.evaluate):
            with pytest.raises(RefusedError, match="began with another configuration"):
                ask(2, arrays)
    with pytest.raises(RefusedError, match="began with another configuration"):
        desk.join()
    assert desk.spent() == 1


def test_the_same_configuration_in_other_words_is_no_second_answer(desk: Any) -> None:
    desk.train()
    spaced = json.dumps(desk.config.as_dict(), indent=1)
    with pytest.raises(RetryError):
        desk.train(config=spaced)
    assert desk.spent() == 1


def test_a_declaration_that_changes_within_a_run_stops_the_run(desk: Any) -> None:
    desk.train()
    larger = desk.site.dataset.model_copy(update={"records": 90})
    before, desk.site = desk.site, desk.site.model_copy(update={"dataset": larger})
    with pytest.raises(RefusedError, match="declaration has changed"):
        desk.train(2)
    desk.site = before
    desk.train(2)


@pytest.mark.parametrize("run", ["", "a/b", "../x", "a\nb", "x" * 101, "ä", "a b", "a\x00"])
def test_a_runs_name_that_could_forge_a_log_line_or_an_id_is_refused(desk: Any, run: str) -> None:
    for ask in (desk.join, desk.train, desk.evaluate):
        with pytest.raises(RefusedError, match="the run's name"):
            ask(run=run)


def test_many_runs_are_held_by_the_datasets_one_budget(new_desk: Desks) -> None:
    desk = new_desk(site={"privacy": {"max_epsilon": 20.0}})
    refused = ""
    while not refused and desk.spent() < 50:
        try:
            desk.train(run=f"run-{desk.spent()}")
        except PolicyError as error:
            refused = str(error)
    assert "lifetime epsilon of dataset 'notes-of-clinic', part 'train'" in refused
    assert 1 <= desk.spent() < 50
    with desk.ledger() as ledger:
        assert ledger.lifetime_epsilon() <= 20.0
    desk.site.dataset.path.unlink()  # refused before any record is touched
    with pytest.raises(PolicyError):
        desk.train(run="one-more")
    with pytest.raises(PolicyError):
        desk.join(run="one-more")


def test_the_whole_run_costs_what_was_planned(desk: Any) -> None:
    for number in (1, 2, 3):
        train, evaluation = desk.train(number), desk.evaluate(number)
    assert train.epsilon <= 8.0
    assert train.epsilon > 7.9
    assert evaluation.epsilon <= 8.0
    with desk.ledger() as ledger:
        assert train.epsilon == ledger.run_epsilon("run", "train", 1e-3)
        assert evaluation.epsilon == ledger.run_epsilon("run", "validation", 1e-3)


# -- concurrent requests ------------------------------------------------------------------------------------


def test_requests_at_once_are_answered_once_and_each_from_its_own_arrays(new_desk: Desks) -> None:
    desk = new_desk(randomness=system)
    desk.join()
    alone = new_desk(name="alone")
    arrays = desk.start()
    answers: dict[Any, Any] = {}
    gate = threading.Barrier(6)

    def ask(number: int) -> None:
        gate.wait(20)
        try:
            answers[number] = (
                desk.train(arrays=arrays) if number < 4 else desk.evaluate(number - 3, arrays, run=f"run-{number}")
            )
        except MoonflowerError as error:
            answers[number] = error

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 6
    assert all(same(answers[0], answers[number]) for number in range(4))
    assert desk.spent() == 3
    for number in (4, 5):
        seen, expected = answers[number].histogram["counts"], alone.evaluate(number - 3).histogram["counts"]
        assert np.abs(seen - expected).max() < 12 * answers[number].noise_multiplier


def test_of_two_configurations_that_race_for_one_run_one_is_refused(
    desk: Any, new_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    from client import answers, training

    right, cheaper = training.train, new_config(training={"rounds": 2})
    outcomes: list[str] = []

    def while_training(*given: Any) -> Any:
        if not outcomes:  # another process of the site is asked meanwhile
            outcomes.append("asked")
            other = type(desk)(desk.site, cheaper)
            with pytest.raises(RefusedError, match="began with another configuration"):
                other.train(2)
        return right(*given)

    monkeypatch.setattr(training, "train", while_training)
    assert answers.training is training
    desk.train()
    assert outcomes == ["asked"]
    assert desk.spent() == 1


# -- what is asked for is checked -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_arrays_that_are_not_the_models_are_refused(desk: Any, kind: str) -> None:
    start = desk.start()
    for fault in ("missing", "extra", "shape", "nan", "inf", "none"):
        with pytest.raises(RefusedError, match="the request's arrays are not"):
            getattr(desk, kind)(arrays=spoilt(start, fault))
    assert desk.spent() == 0


def spoilt(start: dict[str, Any], fault: str) -> dict[str, Any]:
    arrays = {name: array.copy() for name, array in start.items()}
    name = "head.weight"
    match fault:
        case "missing":
            del arrays[name]
        case "extra":
            arrays["encoder.embeddings.word_embeddings.weight"] = np.zeros((29, 32), np.float32)
        case "shape":
            arrays[name] = arrays[name].T.copy()
        case "nan" | "inf":
            arrays[name][0, 0] = float(fault)
        case "none":
            arrays = {}
    return arrays


@pytest.mark.parametrize(
    "config",
    [
        "",
        "{}",
        "[1]",
        '{"model": 3}',
        "null",
        "{" * 2000,
    ],
)
def test_a_configuration_that_is_none_is_refused_in_one_line(desk: Any, config: str) -> None:
    with pytest.raises(ConfigError, match="the request's configuration") as refused:
        desk.train(config=config or " ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy": {"epsilon": -1}},
        {"privacy": {"epsilon": math.nan}},
        {"privacy": {"delta": math.nan}},
        {"privacy": {"delta": 0}},
        {"training": {"sampling_rate": 1.5}},
        {"training": {"sampling_rate": 0}},
        {"training": {"clipping_norm": math.inf}},
        {"training": {"clipping_norm": -1}},
        {"training": {"noise_ratio": 0}},
        {"training": {"noise_multiplier": 0.0}},
        {"training": {"local_steps": 0}},
        {"noise": 0},
        {"seed": -1},
    ],
)
def test_values_out_of_range_do_not_pass_the_sites_own_validation(desk: Any, changes: dict[str, Any]) -> None:
    values = desk.config.as_dict()
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) else value
    with pytest.raises(ConfigError):
        desk.train(config=json.dumps(values))
    assert desk.spent() == 0


def test_a_model_with_other_weights_or_arrays_does_not_join(desk: Any) -> None:
    with pytest.raises(RefusedError, match="its weights differ"):
        desk.join(base_digest="0" * 64)
    with pytest.raises(RefusedError, match="arrays are not this site's"):
        desk.join(shapes="{}")


# -- what the answers do not tell ------------------------------------------------------------------------------


def test_a_join_says_the_same_whatever_the_records(new_desk: Desks, new_rows: Callable[..., Any]) -> None:
    desk = new_desk(rows=new_rows(20))
    said = desk.join()
    desk.write(new_rows(300))
    assert desk.join() == said


def test_one_record_more_changes_nothing_public(new_desk: Desks, new_rows: Callable[..., Any]) -> None:
    desk = new_desk()
    first = desk.train()
    desk.write([*new_rows(100), {"id": "one more", "text": "good", "label": "good"}])
    second = desk.train(run="again")
    third = desk.evaluate(run="again")
    assert (first.sampling_rate, first.noise_multiplier, first.steps, first.epsilon) == (
        second.sampling_rate,
        second.noise_multiplier,
        second.steps,
        second.epsilon,
    )
    assert {name: value.shape for name, value in first.update.items()} == {
        name: value.shape for name, value in second.update.items()
    }
    assert third.histogram["counts"].shape == (2, 2, 10)


def test_the_declared_size_rules_the_rate_and_the_file_does_not(new_desk: Desks, new_rows: Callable[..., Any]) -> None:
    batch = {"training": {"batch_size": 20, "sampling_rate": None}}
    small = new_desk(name="small", config=batch).train()
    large = new_desk(name="large", config=batch, site={"dataset": {"records": 50}}).train()
    grown = new_desk(name="grown", config=batch, rows=new_rows(300)).train()
    assert small.sampling_rate == 20 / 80
    assert large.sampling_rate == 20 / 40
    assert large.noise_multiplier > small.noise_multiplier
    assert (grown.sampling_rate, grown.noise_multiplier) == (small.sampling_rate, small.noise_multiplier)


def test_labels_cannot_be_found_out_by_trying_them(new_desk: Desks, new_rows: Callable[..., Any]) -> None:
    """A site that declares a label says the same to every list of labels, whether a record has the label or not."""
    said = []
    for name, label in (("without", "good"), ("with", "rare")):
        rows = [*new_rows(40), {"id": "last", "text": "good", "label": label}]
        desk = new_desk(name=name, rows=rows, site={"dataset": {"labels": ["bad", "good", "rare"], "id": "notes"}})
        desk.site = desk.site.model_copy(update={"name": "clinic"})
        for labels in (["bad", "good"], ["bad", "good", "rare"], ["bad", "other"], ["rare", "bad", "good", "more"]):
            desk.config = RunConfig.model_validate(
                desk.config.as_dict() | {"task": {"labels": labels, "max_length": 32}}
            )
            try:
                said.append(str(replace(desk.join(run="-".join(labels)), ledger_id="")))
            except MoonflowerError as error:
                said.append(str(error))
    assert said[:4] == said[4:]
    assert sum("JoinReply" in text for text in said) == 4


@pytest.mark.parametrize("size", [1.1e4, 3e38, np.nan])
def test_arrays_beyond_reason_are_refused_before_any_record_is_touched(new_desk: Desks, size: float) -> None:
    """Else a coordinator would see from a failure, uncharged, whether some record has a feature above a bound."""
    desk = new_desk(randomness=system)
    arrays = desk.start()
    for name, array in arrays.items():
        arrays[name] = np.full_like(array, size) if "head" in name else array
    for ask in (desk.evaluate, desk.train):
        with pytest.raises(RefusedError, match="10000"):
            ask(arrays=arrays)
    assert desk.spent() == 0


def test_large_arrays_within_reason_are_answered_like_any_other(new_desk: Desks) -> None:
    desk = new_desk(randomness=system)
    arrays = {name: array * np.float32(1e3 if "head" in name else 1) for name, array in desk.start().items()}
    assert np.isfinite(desk.evaluate(arrays=arrays).histogram["counts"]).all()
    assert all(np.isfinite(array).all() for array in desk.train(arrays=arrays).update.values())
    assert desk.spent() == 2


@pytest.mark.parametrize("panic", [False, True])
def test_a_text_that_breaks_the_runs_tokenizer_goes_unseen(
    new_desk: Desks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, panic: bool
) -> None:
    """A tokenizer's own panic is no `Exception`."""
    right = TextClassification.encode

    def choosy(task: TextClassification, values: Mapping[str, Any], processor: Any) -> Any:
        if "awful" not in values["text"]:
            return right(task, values, processor)
        if panic:
            cut: dict[str, Any] = {"truncation": "only_second", "max_length": 32, "stride": 10}
            processor("the " * 20, "film " * 40, return_overflowing_tokens=True, **cut)
        raise ValueError(f"no token for {values['text']}")

    monkeypatch.setattr(TextClassification, "encode", choosy)
    desk = new_desk()
    desk.join()
    parts = desk.resident.parts(desk.site, desk.config)
    assert len(parts.train) + len(parts.validation) == 100
    assert tokens(parts.train).count((0,)) + tokens(parts.validation).count((0,)) == 10
    assert "cannot take" in caplog.text
    assert "awful" not in caplog.text
    desk.train()
    desk.evaluate()


@pytest.mark.parametrize("ids", [[5] * 600, [5, 10**6]])
def test_a_text_that_would_break_the_runs_model_goes_unseen(
    new_desk: Desks, monkeypatch: pytest.MonkeyPatch, ids: list[int]
) -> None:
    """More tokens than `task.max_length`, or one that the model does not have: the tokenizer is the coordinator's choice."""
    right = TextClassification.encode

    def wild(task: TextClassification, values: Mapping[str, Any], processor: Any) -> Any:
        made = right(task, values, processor)
        return made | {"input_ids": np.asarray(ids, dtype=np.int32)} if "awful" in values["text"] else made

    monkeypatch.setattr(TextClassification, "encode", wild)
    desk = new_desk()
    desk.join()
    parts = desk.resident.parts(desk.site, desk.config)
    assert tokens(parts.train).count((0,)) + tokens(parts.validation).count((0,)) == 10
    desk.train()
    desk.evaluate()


# -- the split is for the dataset's life ------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["key", "share", "column", "lost key"])
def test_a_split_that_changes_stops_the_site(desk: Any, change: str) -> None:
    desk.train()
    dataset = desk.site.dataset
    match change:
        case "key":
            desk.site.split_key.write_bytes(os.urandom(32))
        case "lost key":
            desk.site.split_key.unlink()
        case "share":
            dataset = dataset.model_copy(update={"validation": 0.21})
        case "column":
            dataset = dataset.model_copy(update={"columns": {"id": "text"}})
    desk.site = desk.site.model_copy(update={"dataset": dataset})
    for ask in (desk.train, desk.evaluate, desk.join):
        with pytest.raises(DataError, match="split by another"):
            ask(run="next")
    assert desk.spent() == 1


# -- no privacy -------------------------------------------------------------------------------------------------


def test_a_run_without_privacy_says_so_everywhere(new_desk: Desks) -> None:
    desk = new_desk(
        site={"privacy": {"allow_non_private": True}}, config={"privacy": {"epsilon": math.inf}}, randomness=system
    )
    train, evaluation = desk.train(), desk.evaluate()
    assert (train.epsilon, train.noise_multiplier) == (math.inf, 0.0)
    assert (evaluation.epsilon, evaluation.noise_multiplier) == (math.inf, 0.0)
    counts = evaluation.histogram["counts"]
    assert np.array_equal(counts, counts.round())
    with desk.ledger() as ledger:
        assert ledger.lifetime_epsilon() == math.inf
        assert accounting.epsilon(ledger.run_releases("run", "train"), 1e-3) == math.inf


def test_no_privacy_is_refused_unless_the_site_allows_it(new_desk: Desks) -> None:
    desk = new_desk(config={"privacy": {"epsilon": math.inf}})
    for ask in (desk.join, desk.train, desk.evaluate):
        with pytest.raises(PolicyError, match="allow_non_private"):
            ask()
    assert not Path(desk.site.ledger).exists()


def test_a_site_of_one_coordinator_refuses_the_runs_of_another_in_every_request(new_desk: Desks) -> None:
    connected = {"name": "north", "address": "coordinator.example.org:9443"}
    desk = new_desk(site={"coordinator": connected}, config={"federation": {"coordinator": "south"}})
    for ask in (desk.join, desk.train, desk.evaluate):
        with pytest.raises(RefusedError, match=r"federation\.coordinator='south' is not 'north'"):
            ask()
    assert desk.spent() == 0
    own = new_desk(site={"coordinator": connected}, config={"federation": {"coordinator": "north"}}, name="ward")
    assert own.join().site == "ward"
