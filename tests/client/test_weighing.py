"""Weights of labels and focal losses at a site: they change a record's gradient before it is clipped, and come from outside."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kept
import numpy as np
import pytest
import torch

from client import answers, data
from client.privacy.engine import ClippedSum, Clipping, Gradients, train_only
from client.site import split_key
from client.training import SCALE, EncoderPass
from shared import models
from shared.arrays import Arrays
from shared.errors import ConfigError, RefusedError
from shared.examples import Examples
from shared.messages import TrainReply, TrainRequest
from shared.run_config import RunConfig, parse

Desks = Callable[..., Any]
ONCE = {"rounds": 3, "sampling_rate": 1.0, "local_steps": 1}
OPEN: dict[str, Any] = {"site": {"privacy": {"allow_non_private": True}}}
PLAIN: dict[str, Any] = {"model": {"trainable": "head"}, "privacy": {"epsilon": float("inf")}}


def ask(desk: Any, weights: Arrays, number: int = 1) -> TrainReply:
    request = TrainRequest("run", desk.config.as_json(), number, desk.start(), weights)
    reply = answers.answer(desk.resident, desk.site, "train", request, desk.randomness)
    assert isinstance(reply, TrainReply)
    return reply


def of(*values: float) -> Arrays:
    return {"labels": np.array(values, np.float32)}


def test_a_site_weighs_by_the_request_and_never_by_its_own_labels(
    new_desk: Desks, new_rows: Callable[..., Any]
) -> None:
    """Three records in four are good; the gradient is known in closed form, weighted and then clipped."""
    rows = [row for number, row in enumerate(new_rows(120)) if number % 2 or number % 3 == 0]
    training = ONCE | {"clipping_norm": 2.0, "learning_rate": 1.0}
    desk = new_desk(config=PLAIN | {"training": training, "loss": {"class_weights": "released"}}, rows=rows, **OPEN)
    update = ask(desk, of(0.25, 3.0)).update
    model, examples = models.load(desk.config), desk.resident.parts(desk.site, desk.config).train
    total, norms = np.zeros((2, 32)), []
    for tokens, label in zip(kept.tokens(examples), kept.labels(examples), strict=True):
        ids = torch.tensor([tokens])
        with torch.no_grad():
            feature = model.module.features(input_ids=ids, attention_mask=torch.ones_like(ids))
            gap = model.module.head(feature).softmax(1)[0].double().numpy() - np.eye(2)[label]
        gap *= (0.25, 3.0)[label]
        gradient = np.outer(gap, feature[0].double().numpy())
        norms.append(float(np.sqrt(np.square(gradient).sum() + np.square(gap).sum())))
        total += gradient * min(1, 2.0 / 1.001 / norms[-1])
    assert min(norms) < 2.0 < max(norms)  # some are clipped, after they were weighted
    assert np.allclose(update["head.weight"], -total / 80, atol=1e-5)


@pytest.mark.parametrize("trainable", ["head", "lora"])
@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        ({"class_weights": "released"}, of(10.0, 10.0)),
        ({"class_weights": "given", "weights": [10.0, 10.0]}, {}),
        ({"kind": "focal"}, {}),
    ],
)
def test_neither_weight_nor_focal_factor_lifts_a_record_above_the_clipping_norm(
    new_desk: Desks, new_rows: Callable[..., Any], trainable: str, loss: dict[str, Any], weights: Arrays
) -> None:
    norm = 0.5
    desk = new_desk(
        config=PLAIN | {"model": {"trainable": trainable}, "training": ONCE | {"clipping_norm": norm}, "loss": loss},
        **OPEN,
    )
    key = split_key(desk.site)
    desk.write([row for row in new_rows(100) if not data.is_validation(row["id"], key, 0.2)][:1])
    update = ask(desk, weights).update
    contributed = 80 * np.sqrt(sum(float(np.square(array.astype(np.float64)).sum()) for array in update.values()))
    assert contributed <= norm
    assert contributed > 0.9 * norm or loss.get("kind") == "focal"


@pytest.mark.parametrize(
    ("loss", "weights", "said"),
    [
        ({}, of(1.0, 2.0), "loss.class_weights='none' has none of the coordinator's"),
        ({"class_weights": "released"}, of(1.0, 11.0), "outside 0.1 to 10"),
        ({"class_weights": "released"}, of(0.0, 1.0), "outside 0.1 to 10"),
        ({"class_weights": "released"}, of(float("nan"), 1.0), "outside 0.1 to 10"),
        ({"class_weights": "released"}, of(1.0), "not one number for each of the 2 labels"),
        ({"class_weights": "released"}, {"other": np.ones(2, np.float32)}, "not one number for each of the 2 labels"),
    ],
)
def test_weights_that_the_configuration_does_not_give_are_refused_and_cost_nothing(
    new_desk: Desks, loss: dict[str, Any], weights: Arrays, said: str
) -> None:
    desk = new_desk(config={"training": ONCE, "loss": loss})
    with pytest.raises(RefusedError, match=said):
        ask(desk, weights)
    assert desk.spent() == 0


def test_the_same_question_with_other_weights_is_refused_and_with_the_same_resent(new_desk: Desks) -> None:
    desk = new_desk(config={"training": ONCE, "loss": {"class_weights": "released"}})
    first = ask(desk, of(1.0, 2.0))
    again = ask(desk, of(1.0, 2.0))
    assert all(np.array_equal(first.update[name], again.update[name]) for name in first.update)
    with pytest.raises(RefusedError):
        ask(desk, of(2.0, 1.0))
    assert desk.spent() == 1


def test_a_loss_is_refused_by_a_task_that_does_not_classify_records(new_config: Callable[..., RunConfig]) -> None:
    from shared import tasks

    config = new_config(loss={"kind": "focal"})
    tasks.of(config)
    other = config.model_copy(update={"task": config.task.model_copy(update={"name": "causal-lm", "labels": ()})})
    with pytest.raises(ConfigError, match=r"\[loss\] is for tasks that classify records, and causal-lm does not"):
        tasks.of(other)


# -- float16 -------------------------------------------------------------------------------------------------------


def sums(
    config: RunConfig, rows: list[dict[str, Any]], clipping: Clipping | None = None
) -> tuple[dict[str, torch.Tensor], float]:
    """Return the clipped sum of records, and the most that one of them has contributed."""
    model = models.load(config)
    records = [model.task.encode(row, model.processor) for row in rows]
    passes = EncoderPass(model, Examples.single(model.task, model.processor, records), config)
    parameters = train_only(model.module, model.trainable)
    with Gradients(model.module, parameters, "one-pass") as gradients:
        total = ClippedSum(gradients, clipping or Clipping(0.5, scale=passes.scale))
        units = [(number,) for number in range(len(records))]
        most = max(float(total.add(objective).max()) for objective in passes.groups(units, whole=False))
        return {name: value.clone() for name, value in total.sums().items()}, most


def test_sixteen_bits_give_nearly_the_sum_of_thirty_two_and_no_record_counts_for_more(
    new_config: Callable[..., RunConfig], new_rows: Callable[..., Any]
) -> None:
    rows = new_rows(12)
    exact, _ = sums(new_config(), rows)
    half, most = sums(new_config(hardware={"precision": "float16"}), rows)
    assert most <= 0.5
    for name, value in exact.items():
        assert float((half[name] - value).norm()) <= 0.02 * float(value.norm()), name
    # A scale that only one of the two knew of could make records count for less, and never for more.
    _, unscaled = sums(new_config(hardware={"precision": "float16"}), rows, Clipping(0.5))
    assert unscaled <= 0.5
    _, unmultiplied = sums(new_config(), rows, Clipping(0.5, scale=SCALE))
    assert unmultiplied <= 0.5


def test_a_clipping_scale_is_divided_out(new_config: Callable[..., RunConfig]) -> None:
    norms = torch.tensor([0.01, 0.3, 5.0, 0.0])
    for mode in ("flat", "normalise"):
        plain = Clipping(0.5, mode)  # type: ignore[arg-type]
        scaled = replace(plain, scale=1024.0)
        assert torch.allclose(scaled.factors(norms * 1024) * 1024, plain.factors(norms))
        assert float((scaled.factors(norms * 1024) * norms * 1024).max()) <= 0.5


def test_the_number_of_threads_is_the_sites(new_desk: Desks) -> None:
    before = torch.get_num_threads()
    try:
        desk = new_desk(site={"threads": before + 1})
        desk.join()
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    with pytest.raises(ConfigError, match="threads=0 must be at least 1"):
        parse(type(desk.site), desk.site.model_dump() | {"threads": 0}, source="site.toml")


def test_the_head_of_many_labels_is_trained_and_scored_on_features(
    new_desk: Desks, new_rows: Callable[..., Any]
) -> None:
    rows = [row | {"label": [row["label"], "good"] if row["label"] == "bad" else []} for row in new_rows(100)]
    desk = new_desk(config={"model": {"trainable": "head"}, "task": {"multi_label": True}, "training": ONCE}, rows=rows)
    assert set(ask(desk, {}).update) == {"head.weight", "head.bias"}
    assert desk.evaluate(3, desk.start()).histogram["counts"].shape == (2, 2, 10)
