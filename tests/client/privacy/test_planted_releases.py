"""Planted bugs of what is released and charged, and the audits that find them: see test_planted_bugs.py."""

import math
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, fields, replace
from typing import Any

import kept
import numpy as np
import pytest
import torch
from torch import nn

from client import answers, evaluation
from client import site as sites
from client.privacy import limits
from client.privacy.ledger import Ledger
from client.privacy.randomness import Keystream
from client.resident import Resident
from shared import accounting, ledger_chain, messages, plan
from shared.accounting import Release, epsilon
from shared.errors import BudgetError
from shared.plan import DatasetCard

Desks = Callable[..., Any]
Planted = Callable[..., AbstractContextManager[None]]
Rows = Callable[..., Any]


def system(_: str) -> Keystream:
    return Keystream.from_system()


# -- a new accountant a round ----------------------------------------------------------------------------------------


def epsilons_add_up(new_desk: Desks, name: str) -> bool:
    """Whether the epsilon of each reply is that of all the run's replies so far."""
    desk = new_desk(name=name, config={"model": {"trainable": "head"}, "training": {"rounds": 4}})
    start, right = desk.start(), True
    for number in range(1, 5):
        step, histogram = desk.train(number, start), desk.evaluate(number, start)
        steps = Release(step.sampling_rate, step.noise_multiplier, step.steps * number)
        right &= step.epsilon == pytest.approx(epsilon([steps], 1e-3), rel=1e-6)
        right &= histogram.epsilon == pytest.approx(epsilon([Release(1.0, histogram.noise_multiplier, number)], 1e-3))
    return right


def releases_within(new_desk: Desks, name: str) -> tuple[int, int]:
    """Count the runs that a site answers once each, and those that its lifetime budget holds."""
    desk = new_desk(
        name=name,
        config={"model": {"trainable": "head"}, "training": {"rounds": 1}},
        site={"privacy": {"max_epsilon": 25.0}},
    )
    start, answered = desk.start(), 0
    while answered < 12:
        try:
            reply = desk.train(1, start, run=f"run-{answered}")
        except BudgetError:
            break
        answered += 1
    with desk.ledger() as ledger:
        price = accounting.rdp(Release(reply.sampling_rate, reply.noise_multiplier, reply.steps), ledger.order)
        return answered, int(accounting.rdp_budget(25.0, 1e-3, ledger.order) / price)


def test_a_new_accountant_a_round_is_caught(new_desk: Desks, planted: Planted) -> None:
    """Epsilon is that of the last round alone, in what is said or in what is allowed.

    Claim: one round's epsilon for all four; 100 rounds of 15 steps at rate 1/40 and sigma 1 say 1.0 and are 6.2.
    Statistic: each reply's epsilon beside PLD of all releases so far; answers beside what the lifetime budget holds.
    Certain, both ways.
    """
    assert epsilons_add_up(new_desk, "right")
    with planted(
        answers._release, "epsilon([*ledger.run_releases(request.run, part), release], ", "epsilon([release], "
    ):
        assert not epsilons_add_up(new_desk, "anew")
    answered, held = releases_within(new_desk, "holds")
    assert 1 <= answered == held < 12
    with planted(limits.refuse_beyond_budget, "spent, reserved = account.spent(part),", "spent, reserved = 0.0,"):
        answered, held = releases_within(new_desk, "forgets")
        assert answered > held
    said, spent = epsilon([Release(1 / 40, 1.0, 15)], 1e-5), epsilon([Release(1 / 40, 1.0, 1500)], 1e-5)
    assert (said, spent) == (pytest.approx(1.02, abs=0.01), pytest.approx(6.20, abs=0.01))


# -- a raw metric released -------------------------------------------------------------------------------------------


def public_values(desk: Any) -> dict[str, Any]:
    """Return the public values of a joining, a round and an evaluation, and the names and shapes of what is released.

    The account's name and its events' digests are left out: random, and held to the ledger's chain instead.
    """
    found: dict[str, Any] = {}
    for kind in ("join", "train", "evaluate"):
        reply = getattr(desk, kind)()
        for item in fields(reply):
            value = getattr(reply, item.name)
            if item.metadata["leaves"] == "released":
                value = {name: array.shape for name, array in value.items()}
            elif item.name in ("ledger_id", "ledger_head"):
                with desk.ledger() as ledger:
                    export = ledger.export()
                heads = [ledger_chain.NO_HEAD, *(event["row"] for event in export["events"])]
                known = heads[reply.ledger_number - (kind != "join")] if item.name == "ledger_head" else ledger.account
                assert value == known
                assert ledger_chain.verify(export) is None
                continue
            found[f"{kind}.{item.name}"] = value
    return found


def values_without_noise(desk: Any) -> int:
    """Count released values that are the same in three releases of three noises."""
    bare, start = 0, desk.start()
    for ask in (desk.train, desk.evaluate):
        replies = [ask(1, start, run=run) for run in ("first", "second", "third")]
        assert replies[0].noise_multiplier > 0.5
        for item in fields(replies[0]):
            if item.metadata["leaves"] == "released":
                first, *others = (getattr(reply, item.name) for reply in replies)
                for name, values in first.items():
                    bare += int(np.all([values == other[name] for other in others], axis=0).sum())
    return bare


def leaks(new_desk: Desks, new_rows: Rows, name: str) -> tuple[set[str], int]:
    """Name the public values that two sites of other data differ in, and count the released ones without noise."""
    others = [row | {"label": "good"} for row in new_rows(100)[:70]]
    config = {"model": {"trainable": "head"}}
    found = []
    for rows in (None, others):
        desk = new_desk(name=name, rows=rows, config=config)
        found.append(public_values(desk))
        folder = desk.site.ledger.parent
        folder.rename(folder.with_name(f"{name}-{len(found)}"))
    differing = {key for key in found[0] | found[1] if found[0].get(key) != found[1].get(key)}
    expected = {"head.weight": (2, 32), "head.bias": (2,)}
    if found[0]["train.update"] != expected or found[0]["evaluate.histogram"] != {"counts": (2, 2, 10)}:
        differing.add("released names")
    return differing, values_without_noise(new_desk(name=f"{name}-noise", config=config, randomness=system))


@dataclass(frozen=True)
class LeakyReply(messages.TrainReply):
    """A reply with one more number, marked as if it followed from what is declared."""

    loss: float = field(default=0.0, metadata={"leaves": "public"})


def raw_loss(resident: Resident, site: sites.Site, config: Any) -> float:
    model, examples = resident.model(config, site.device), resident.parts(site, config).train
    with torch.no_grad():
        given = [torch.tensor([ids]) for ids in kept.tokens(examples)]
        logits = torch.cat([model.module(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in given])
    return float(nn.functional.cross_entropy(logits, torch.tensor(kept.labels(examples))))


def test_a_raw_metric_released_is_caught(
    new_desk: Desks, new_rows: Rows, monkeypatch: pytest.MonkeyPatch, planted: Planted
) -> None:
    """A loss, an accuracy, a count of records or a histogram's empty cell leaves as it is.

    Claim: the epsilon of the noised releases. A number without noise that depends on a record has delta 1 at any epsilon.
    Statistic: public values and released names at two sites that declare the same and hold other data, under the same
    random numbers; and released values that are the same in three releases under three noises.
    False alarm: that a noised float32 comes out the same three times, below 1e-8 over all 106 of them. Miss: 0 where the
    number differs between the two sites, or is released among noised ones.
    """
    assert leaks(new_desk, new_rows, "right") == (set(), 0)
    spacing, deviation = np.spacing(np.float32(64)), 0.5  # of counts; an update's are 1e-8 and 1e-2
    assert 106 * (spacing / (2 * math.pi**0.5 * deviation)) ** 2 < 1e-8
    with planted(answers._join, "card.records,", "len(resident.parts(site, config).train),"):
        assert leaks(new_desk, new_rows, "counts") == ({"join.records"}, 0)
    with monkeypatch.context() as patch:
        patch.setattr(answers, "TrainReply", LeakyReply)
        patch.setattr(answers, "raw_loss", raw_loss, raising=False)
        added = "gradients=done.gradients, loss=raw_loss(resident, site, config),"
        with planted(answers._release, "gradients=done.gradients,", added):
            assert leaks(new_desk, new_rows, "losses") == ({"train.loss"}, 0)
    sent = 'return {"counts": noised.reshape(model.task.cells).numpy()}'
    accuracy = "np.float32([np.trace(total.reshape(model.task.cells).sum(2)) / total.sum()])"
    bare = "(noised.numpy() * (total > 0)).astype(np.float32).reshape(model.task.cells)"
    with planted(
        evaluation.evaluate,
        sent,
        f'return {{"counts": noised.reshape(model.task.cells).numpy(), "accuracy": {accuracy}}}',
    ):
        assert leaks(new_desk, new_rows, "scores") == ({"released names"}, 1)
    with planted(evaluation.evaluate, sent, f'return {{"counts": {bare}}}'):
        differing, bare = leaks(new_desk, new_rows, "zeros")
        assert (differing, bare > 0) == (set(), True)


# -- a retry that draws new noise ------------------------------------------------------------------------------------


def answers_to_one_request(new_desk: Desks, name: str) -> tuple[int, int]:
    """Ask one question of each kind five times, warm and cold; count the answers that differ, and the charges."""
    desk = new_desk(name=name, config={"model": {"trainable": "head"}}, randomness=system)
    start, found = desk.start(), set()
    for number in range(5):
        found |= {messages.to_bytes(ask(1, start)) for ask in (desk.train, desk.evaluate)}
        if number == 2:
            desk.resident = Resident()
    return len(found), desk.spent()


def test_a_retry_that_draws_new_noise_is_caught(
    new_desk: Desks, monkeypatch: pytest.MonkeyPatch, planted: Planted
) -> None:
    """The same request is computed again, charged as another one or not at all.

    Claim: one release at sigma. The mean of five has sigma / 5^(1/2): one step of sigma 1 says epsilon 4.4, and five
    retries have 11.5.
    Statistic: different answers, and charges, of one request of each kind asked five times: 2 and 2.
    Certain, but for new noise that gives the very same 66 float32 values: chance below 1e-300.
    """
    assert answers_to_one_request(new_desk, "right") == (2, 2)
    with monkeypatch.context() as patch:
        named = messages.request_id
        patch.setattr(messages, "request_id", lambda *about: f"{named(*about)}/{os.urandom(4).hex()}")
        assert answers_to_one_request(new_desk, "numbered") == (10, 10)
    with (
        planted(answers._release, "kept = ledger.recall(question)", "kept = None"),
        planted(Ledger.charge, "return kept\n", "return reply(self.number, self.head)\n"),
    ):
        assert answers_to_one_request(new_desk, "free") == (10, 2)
    said, spent = epsilon([Release(1.0, 1.0, 1)], 1e-5), epsilon([Release(1.0, 1.0, 5)], 1e-5)
    assert (said, spent) == (pytest.approx(4.38, abs=0.01), pytest.approx(11.48, abs=0.01))


# -- a reservation not counted ---------------------------------------------------------------------------------------


def two_at_once(new_desk: Desks, name: str) -> tuple[bool, float]:
    """Ask a second run while the first is computed, of a budget for one and a half.

    Returns whether the second was computed, and what was charged in all, over the budget.
    """
    config = {"model": {"trainable": "head"}, "training": {"rounds": 1}}
    (release,) = plan.make(new_desk(name=f"{name}-plan", config=config).config, DatasetCard("any", 100, 0.2)).releases(
        "train"
    )

    def held(limit: float) -> float:
        order = accounting.best_order(limit, 1e-3)
        return accounting.rdp_budget(limit, 1e-3, order) / accounting.rdp(release, order)

    limit = min(np.arange(4.0, 40.0, 0.5).tolist(), key=lambda limit: abs(held(limit) - 1.5))
    assert 1.2 < held(limit) < 1.8
    first = new_desk(name=name, config=config, site={"privacy": {"max_epsilon": limit}})
    second = replace(first, resident=Resident())  # another process, with the same ledger
    start, under_way, go_on, computed = first.start(), threading.Event(), threading.Event(), []

    def slow(_: str) -> Keystream:
        under_way.set()
        assert go_on.wait(60)
        return Keystream.from_system()

    def noted(_: str) -> Keystream:
        computed.append(True)
        return Keystream.from_system()

    def work() -> None:
        with suppress(BudgetError):
            first.train(1, start, run="first")

    first.randomness, second.randomness = slow, noted
    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert under_way.wait(60)
        with suppress(BudgetError):
            second.train(1, start, run="second")
    finally:
        go_on.set()
        thread.join()
    return bool(computed), first.spent() / held(limit)


def test_a_reservation_not_counted_is_caught(new_desk: Desks, planted: Planted) -> None:
    """Each of two runs at once finds room for itself alone.

    Claim: the dataset's limit on epsilon, which two runs together pass by a third.
    Statistic: whether a second run is computed while the first holds the budget; what is charged, over the budget.
    Certain, both ways: the second asks when the first is known to hold it. Reservations alone uncounted, the second
    check, at the charge, still keeps the budget, and one of the two has worked in vain.
    """
    computed, charged = two_at_once(new_desk, "right")
    assert (computed, charged <= 1) == (False, True)
    with planted(limits._reserved_by_others, "return math.fsum(dearest.values())", "return 0.0"):
        computed, charged = two_at_once(new_desk, "uncounted")
        assert (computed, charged <= 1) == (True, True)
        check = "self._refuse_beyond_limits(question, release, allow_unbounded)"
        with planted(Ledger.charge, check, "pass"):
            computed, charged = two_at_once(new_desk, "unchecked")
            assert (computed, charged > 1.1) == (True, True)
