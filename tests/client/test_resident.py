"""What a process keeps warm, and when it does not trust it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from kept import tokens

from client.privacy import probe
from client.resident import Resident
from shared.run_config import RunConfig
from simulations.pool import PoolResident

Desks = Callable[..., Any]


def test_a_warm_answer_is_a_cold_one(new_desk: Desks) -> None:
    """With the same random numbers, to the bit: nothing drawn depends on what is kept."""
    warm = {"rounds": 2, "sampling_rate": 0.5}
    cold, hot = (new_desk(name=name, config={"warm_start": warm}) for name in ("cold", "hot"))
    for number in (1, 2, 3):
        cold.resident.__init__()
        update = cold.train(number, run="run").update
        kept = hot.train(number, run="run").update
        assert all(np.array_equal(update[name], kept[name]) for name in update)
        cold.resident.__init__()
        assert np.array_equal(cold.evaluate(number).histogram["counts"], hot.evaluate(number).histogram["counts"])


def test_a_round_leaves_nothing_in_the_model_for_the_next(new_desk: Desks) -> None:
    first, second = new_desk(name="first"), new_desk(name="second")
    first.train(1)
    after, alone = first.train(2).update, second.train(2).update
    assert all(np.array_equal(after[name], alone[name]) for name in alone)


def test_a_file_that_changes_is_read_again_though_its_length_is_the_same(new_desk: Desks) -> None:
    desk = new_desk()
    texts = desk.resident.parts(desk.site, desk.config)
    features = kept(desk)
    rows = desk.rows()
    for row in rows:
        row["text"] = "the film was really grim"
    desk.write(rows)
    assert tokens(desk.resident.parts(desk.site, desk.config).train) != tokens(texts.train)
    assert not torch.equal(kept(desk), features)
    assert torch.equal(kept(desk)[0], kept(desk)[1])


def test_two_sites_of_one_process_share_the_model_and_nothing_else(
    new_desk: Desks, new_rows: Callable[..., Any]
) -> None:
    north, south = new_desk(name="north"), new_desk(name="south", rows=new_rows(100, "other"))
    south.resident = north.resident
    south.site = south.site.model_copy(update={"name": "north"})  # even by one name
    assert north.model is south.model
    assert kept(north).shape != kept(south).shape or not torch.equal(kept(north), kept(south))


def test_other_arrays_give_other_features(new_desk: Desks) -> None:
    desk = new_desk()
    first = kept(desk)
    arrays = desk.start()
    arrays = {name: array + np.float32(0.5) if ".lora_" in name else array for name, array in arrays.items()}
    assert not torch.equal(kept(desk, arrays), first)
    assert torch.equal(kept(desk), first)


def test_another_model_or_task_drops_what_was_kept(desk: Any, new_config: Callable[..., RunConfig]) -> None:
    first, parts = desk.model, desk.resident.parts(desk.site, desk.config)
    assert desk.model is first
    desk.config = new_config(task={"max_length": 16})
    assert desk.model is not first
    assert max(map(len, tokens(desk.resident.parts(desk.site, desk.config).train))) == 16
    assert max(map(len, tokens(parts.train))) > 16


def kept(desk: Any, arrays: Any = None) -> torch.Tensor:
    from shared.arrays import write

    arrays = desk.start() if arrays is None else arrays
    write(desk.model.module, arrays)
    parts = desk.resident.parts(desk.site, desk.config)
    found: torch.Tensor = desk.resident.features(desk.site, "train", parts.train, desk.config, arrays)
    return found


def test_a_site_probes_before_every_release_and_many_virtual_sites_once_for_the_same_arrays(
    new_desk: Desks, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[str] = []

    def seen(name: str, real: Callable[..., Any], *given: Any, **named: Any) -> Any:
        probes.append(name)
        return real(*given, **named)

    for name in ("check", "agrees"):
        monkeypatch.setattr(probe, name, partial(seen, name, getattr(probe, name)))
    for resident, expected in ((Resident(), ["check", "agrees", "agrees"]), (PoolResident(), ["check", "agrees"])):
        probes.clear()
        desk = new_desk(name=f"after-{len(expected)}")
        desk.resident = resident
        moved = {name: array + np.float32(0.01) for name, array in desk.start().items()}
        for run, arrays in (("first", None), ("second", None), ("third", moved)):
            desk.train(run=run, arrays=arrays)
        assert probes == expected
