"""A site that trains both factors of its adapters: they are one vector of bounded norm, and the probe sees both."""

from collections.abc import Callable
from typing import Any

import kept
import numpy as np
import pytest
import torch
from torch import Tensor

from client.privacy.engine import Clipping, Gradients, Objective
from shared import models
from shared.errors import ModelError, SensitivityError

Desks = Callable[..., Any]
BOTH = {"model": {"lora": {"train_a": True}}}
ONCE = {"rounds": 3, "sampling_rate": 1.0, "local_steps": 1, "server_optimizer": "fedavg"}


def test_both_factors_are_trained_and_sent_and_what_is_frozen_is_the_same(new_config: Callable[..., Any]) -> None:
    one, both = models.load(new_config()), models.load(new_config(training=ONCE, **BOTH))
    assert both.base_digest == one.base_digest
    assert both.exchanged == one.exchanged
    assert set(both.trainable) == set(both.exchanged)
    assert set(one.exchanged) - set(one.trainable) == {name for name in both.trainable if ".lora_A." in name}
    assert both.names("warm_start") == ("head.weight", "head.bias")


def test_the_update_is_the_sum_of_records_clipped_over_both_factors(new_desk: Desks) -> None:
    """Against a plain loop over single records, with B where a later round has it."""
    norm = 0.5
    config = BOTH | {"training": ONCE | {"clipping_norm": norm}, "privacy": {"epsilon": float("inf")}}
    desk = new_desk(config=config, site={"privacy": {"allow_non_private": True}})
    random = np.random.default_rng(1)
    start = desk.start()
    start |= {n: random.normal(0, 2.0, a.shape).astype(np.float32) for n, a in start.items() if ".lora_B." in n}
    update = desk.train(arrays=start).update
    model, examples = models.load(desk.config), desk.resident.parts(desk.site, desk.config).train
    parameters = {name: value for name, value in model.module.named_parameters() if name in model.trainable}
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(torch.from_numpy(start[name]))
    total = {name: np.zeros(tuple(value.shape)) for name, value in parameters.items()}
    shares = []
    for tokens, label in zip(kept.tokens(examples), kept.labels(examples), strict=True):
        ids = torch.tensor([tokens])
        logits = model.module(input_ids=ids, attention_mask=torch.ones_like(ids))
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([label]))
        found = torch.autograd.grad(loss, list(parameters.values()))
        squares = {name: float(part.square().sum()) for name, part in zip(parameters, found, strict=True)}
        length = sum(squares.values()) ** 0.5
        shares.append(sum(value for name, value in squares.items() if ".lora_A." in name) / length**2)
        for name, part in zip(parameters, found, strict=True):
            total[name] += part.double().numpy() * min(1.0, norm / 1.001 / length)
    assert max(shares) > 0.05  # A's part shows in the norm
    for name, value in total.items():
        assert np.allclose(update[name], -value / 80, atol=2e-6), name


def forget_a(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave A out of the norms by which records are clipped."""

    def add(self: Gradients, objective: Objective, clipping: Clipping, sums: dict[str, Tensor], **_: Any) -> Tensor:
        samples = self.per_record(objective)
        norms = torch.stack([s.flatten(1).norm(dim=1) for n, s in samples.items() if ".lora_A." not in n]).norm(dim=0)
        for name, sample in samples.items():
            scaled = sample * clipping.factors(norms).view(-1, *[1] * (sample.dim() - 1))
            sums[name] = sums.get(name, torch.zeros(())) + scaled.sum(0)
        return norms

    monkeypatch.setattr(Gradients, "add", add)


def test_an_engine_that_forgets_a_is_refused_at_the_first_release_where_b_is_still_zero(
    new_desk: Desks, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = new_desk(config=BOTH | {"training": ONCE | {"local_steps": 2}})
    assert not any(array.any() for name, array in desk.start().items() if ".lora_B." in name)
    with monkeypatch.context() as planted:
        forget_a(planted)
        with pytest.raises(SensitivityError, match=r"lora_[AB]"):  # a wrong norm scales both
            desk.train()
    assert desk.spent() == 0
    assert desk.train().round == 1


def test_the_probes_made_up_factors_leave_no_trace(new_desk: Desks) -> None:
    """Without noise and without a step's records, the arrays are where they were."""
    config = BOTH | {"training": ONCE | {"sampling_rate": 1e-9}, "privacy": {"epsilon": float("inf")}}
    desk = new_desk(config=config, site={"privacy": {"allow_non_private": True}})
    assert not any(array.any() for array in desk.train().update.values())


def test_a_rank_above_a_layers_smaller_side_is_refused(new_config: Callable[..., Any]) -> None:
    config = new_config(training=ONCE, model={"lora": {"train_a": True, "rank": 33}})
    with pytest.raises(ModelError, match=r"model.lora.rank=33 is above 32.*set model.lora.train_a=false"):
        models.load(config)
