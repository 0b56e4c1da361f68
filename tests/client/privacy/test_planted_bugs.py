"""Twelve bugs that make a privacy claim untrue, each planted where a programmer would make it, and the audit that finds it.

An audit looks at what a site does through its public path, its answers to requests, and says whether one property of the
claim holds. Each test runs it on the code as it is and on the code with the bug, and states two chances. *False alarm*: that
the right code is refused. *Miss*: that the bug is not seen; 1 minus it is the power. Both are computed in the test from the
audit's null distribution, not guessed; where a property holds or not whatever is drawn, both are 0, and the test says
"certain". docs/guides/audits.md has the table.
"""

import hashlib
import inspect
import math
import os
import random
import shutil
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import beta, binom, chi2
from torch import Tensor, nn

import client.app
from client import answers, data, evaluation, made_up, training
from client import site as sites
from client.privacy import limits, probe
from client.privacy.book import Entry
from client.privacy.engine import SLACK, Booked, ClippedSum, Clipping, Gradients, Objective, train_only
from client.privacy.ledger import Ledger
from client.privacy.randomness import Keystream
from client.resident import Resident
from shared import accounting, ledger_chain, messages, plan
from shared.accounting import Release, epsilon
from shared.arrays import Arrays
from shared.errors import BudgetError, SensitivityError
from shared.plan import DatasetCard
from shared.tasks.text_classification import Examples

BUGS = (
    "shuffling accounted as Poisson",
    "an empty batch skipped",
    "clipping per token",
    "a new accountant a round",
    "noise divided by the batch",
    "a seed reused after resume",
    "sampling from the run's seed",
    "an unclipped tied weight",
    "a probe on private records",
    "a raw metric released",
    "a retry that draws new noise",
    "a reservation not counted",
)
ALARM = 1e-6  # the chance, at most, that an audit refuses right code

Desks = Callable[..., Any]
Rows = Callable[..., Any]
Values = npt.NDArray[np.float64]
CAUGHT: dict[str, str] = {}  # bug -> the test that catches it


def catches(bug: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def note(test: Callable[..., None]) -> Callable[..., None]:
        assert bug not in CAUGHT
        CAUGHT[bug] = test.__name__
        return test

    return note


@contextmanager
def planted(function: Callable[..., Any], old: str, new: str, **names: Any) -> Iterator[None]:
    """Plant a bug as an edit: a function of the project has `new` in its text for `old`, which must stand there once.

    `names` are modules that the new text needs besides.
    """
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(old) == 1, f"{function.__qualname__} has changed: plant the bug anew"
    module = sys.modules[function.__module__]
    made: dict[str, Any] = {}
    exec(compile(text.replace(old, new), f"<{function.__qualname__}, edited>", "exec"), vars(module), made)  # noqa: S102
    *path, name = function.__qualname__.split(".")
    owner: Any = module
    for part in path:
        owner = getattr(owner, part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, made[name])
        for word, value in names.items():
            patch.setattr(module, word, value, raising=False)
        yield


def system(_: str) -> Keystream:
    return Keystream.from_system()


def flat(update: Arrays) -> Values:
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


NOT_PRIVATE = {"privacy": {"allow_non_private": True}}
PLAIN = {"privacy": {"epsilon": math.inf}}  # what is summed can be seen


def validation_rows(desk: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    key = sites.split_key(desk.site)
    return [row for row in rows if data.is_validation(row["id"], key, 0.2)]


# -- 1 -----------------------------------------------------------------------------------------------------------


def variance_of_draws(new_desk: Desks, name: str, rounds: int = 24) -> tuple[float, int]:
    """Sum, over rounds of two steps at rate 1/2, of (drawn - n)², decoded from the updates; and n, the records.

    All records have one text and label, and their gradient is clipped, so that a noiseless update's norm counts them.
    """
    norm, config = 1e-3, {"model": {"trainable": "head"}} | PLAIN
    rows = [{"id": f"record-{number}", "text": "a good film", "label": "good"} for number in range(100)]
    phase = {"rounds": rounds, "sampling_rate": 0.5, "local_steps": 2, "clipping_norm": norm}
    desk = new_desk(name=name, config=config | {"training": phase}, site=NOT_PRIVATE, rows=rows, randomness=system)
    records, start, total = len(desk.resident.parts(desk.site, desk.config).train), desk.start(), 0.0
    for number in range(1, rounds + 1):
        drawn = np.linalg.norm(flat(desk.train(number, start).update)) * (0.5 * 80) * (1 + SLACK) / norm
        assert abs(drawn - round(drawn)) < 0.1
        total += (round(drawn) - records) ** 2
    return total, records


def quantiles_of_draws(records: int, rounds: int) -> tuple[int, int]:
    """Exact quantiles at ALARM / 2 of that sum where each of n records enters each of the two steps with chance 1/2."""
    drawn = np.arange(2 * records + 1)
    squares = np.bincount((drawn - records) ** 2, weights=binom.pmf(drawn, 2 * records, 0.5))
    size = rounds * records**2 + 1
    length = 1 << (size - 1).bit_length()
    whole = np.fft.irfft(np.fft.rfft(squares, length) ** rounds, length)[:size].clip(0)
    below = np.cumsum(whole)
    return int(np.searchsorted(below, ALARM / 2)), int(np.searchsorted(below, 1 - ALARM / 2))


def shuffled(self: Any, n: int, rate: float) -> npt.NDArray[np.int64]:
    """Cut an epoch into batches, as `DataLoader(shuffle=True)` does."""
    left = self.__dict__.pop("left", None) or np.argsort(self.uniform(n)).tolist()
    batch, self.left = left[: math.ceil(n * rate)], left[math.ceil(n * rate) :]
    return np.sort(np.asarray(batch, dtype=np.int64))


def in_bins(self: Any, n: int, rate: float) -> npt.NDArray[np.int64]:
    """Put every record into one step of the epoch, whichever: batches of random size."""
    left = self.__dict__.pop("left", None)
    if not left:
        step = np.floor(self.uniform(n) / rate)
        left = [step == number for number in range(round(1 / rate))]
    batch, *self.left = left
    return np.flatnonzero(batch).astype(np.int64)


def of_fixed_size(self: Keystream, n: int, rate: float) -> npt.NDArray[np.int64]:
    """Draw just as many records as are expected, each step anew."""
    return np.sort(np.argsort(self.uniform(n))[: round(n * rate)]).astype(np.int64)


@catches("shuffling accounted as Poisson")
def test_shuffling_accounted_as_poisson_is_caught(new_desk: Desks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches cut from a shuffled epoch, and epsilon computed as if each record were drawn on its own.

    Claim: 400 steps at rate 1/40, sigma 1 and delta 1e-5 say epsilon 3.2. Shuffled, what is proven is 10 passes of a
    plain Gaussian: 17.9.
    Statistic: the sum over 24 epochs of (records drawn - n)². Independent draws give it 24 n/2; any epoch in which
    each record comes just once gives 0, and a sample of fixed size at most 1 an epoch.
    False alarm: 1e-6, by the exact distribution. Miss: 0, for 24 is below the lower quantile, about 140 of the
    924 expected.
    """
    rounds = 24
    statistic, records = variance_of_draws(new_desk, "right", rounds)
    low, high = quantiles_of_draws(records, rounds)
    assert low < statistic < high
    assert low > 2 * rounds
    for wrong in (shuffled, in_bins, of_fixed_size):
        monkeypatch.setattr(Keystream, "poisson_sample", wrong)
        assert variance_of_draws(new_desk, wrong.__name__.replace("_", "-"), rounds)[0] <= rounds
    claimed, proven = epsilon([Release(1 / 40, 1.0, 400)], 1e-5), epsilon([Release(1.0, 1.0, 10)], 1e-5)
    assert (claimed, proven) == (pytest.approx(3.17, abs=0.01), pytest.approx(17.86, abs=0.01))


# -- 2 -----------------------------------------------------------------------------------------------------------


class Counting(Keystream):
    """A stream that counts the samples taken from it."""

    samples = 0

    def poisson_sample(self, n: int, rate: float) -> npt.NDArray[np.int64]:
        self.samples += 1
        return super().poisson_sample(n, rate)


def silent_or_redrawn(new_desk: Desks, name: str, rounds: int) -> tuple[int, int, float]:
    """Count the rounds of one step without noise, and samples beyond one a step; and the chance of an empty sample."""
    rate = 0.004
    phase = {"rounds": rounds, "sampling_rate": rate, "local_steps": 1}
    desk = new_desk(
        name=name,
        config={"model": {"trainable": "head"}, "training": phase},
        site={"privacy": {"min_noise_multiplier": 0.01}},
    )
    streams: list[Counting] = []
    desk.randomness = lambda _: streams.append(Counting(os.urandom(32))) or streams[-1]
    start = desk.start()
    updates = [flat(desk.train(number, start).update) for number in range(1, rounds + 1)]
    with desk.ledger() as ledger:
        assert sum(spend.release.steps for spend in ledger.spends()) == rounds
    silent, extra = sum(not update.any() for update in updates), sum(stream.samples - 1 for stream in streams)
    return silent, extra, (1 - rate) ** len(desk.resident.parts(desk.site, desk.config).train)


@catches("an empty batch skipped")
def test_an_empty_batch_skipped_is_caught(new_desk: Desks) -> None:
    """A step that draws nobody is left out, without noise, or drawn again until it has somebody.

    Claim: epsilon at delta. A site without records would then always answer zero, and with one record it answers
    something else with the sampling rate's chance: delta is at least the rate, 0.004 here for a claimed 0.001.
    Statistic: updates that are exactly zero, and samples beyond one a step; none of either may be.
    False alarm: none that could be seen: noise that leaves 66 float32 weights unmoved. Miss: no empty sample in all 13
    rounds, (1 - 0.73)^13, below 1e-7.
    """
    rounds = 13
    silent, extra, empty = silent_or_redrawn(new_desk, "right", rounds)
    assert (silent, extra) == (0, 0)
    assert (1 - empty) ** rounds < 1e-7
    groups = "for batch in objective.groups"
    with planted(training.train, groups, f"if not drawn:\n                continue\n            {groups}"):
        silent, extra, _ = silent_or_redrawn(new_desk, "skips", rounds)
        assert (silent > 0, extra) == (True, 0)
    draw = "randomness.poisson_sample(len(examples), steps.sampling_rate).tolist()"
    with planted(training.train, draw, f"next(drawn for drawn in iter(lambda: {draw}, None) if drawn)"):
        silent, extra, _ = silent_or_redrawn(new_desk, "redraws", rounds)
        assert (silent, extra > 0) == (0, True)


# -- 3 -----------------------------------------------------------------------------------------------------------


def reach_of_a_record(new_desk: Desks, site: str, **model: Any) -> float:
    """Norm that a site's only record gives the sum, over the clipping norm: from a noiseless update of all weights."""
    norm = 0.01
    phase = {"rounds": 1, "sampling_rate": 1.0, "local_steps": 1, "clipping_norm": norm}
    how = {"hardware": {"gradients": "one-pass"}}
    config = {"model": {"trainable": "full"} | model, "training": phase} | how | PLAIN
    desk = new_desk(name=site, config=config, site=NOT_PRIVATE, randomness=system)
    rows = desk.rows()
    kept = validation_rows(desk, rows)
    longest = max((row for row in rows if row not in kept), key=lambda row: len(row["text"]))
    desk.write([*kept, longest])
    assert len(desk.resident.parts(desk.site, desk.config).train) == 1
    arrays = desk.start()
    arrays["head.weight"] = 20 * arrays["head.weight"]  # so that most of the gradient is the encoder's
    try:
        return float(np.linalg.norm(flat(desk.train(1, arrays).update))) * 80 / norm
    except SensitivityError:
        assert desk.spent() == 0
        raise


def clip_by_token(self: Booked, objective: Objective, clipping: Clipping, sums: dict[str, Tensor]) -> Tensor:
    """Clip what each token gives, as if tokens were records: what Opacus does where a layer sees flattened tokens."""
    entries = self._book(objective)
    with torch.no_grad():
        for name, entry in entries.items():
            total = sums.setdefault(name, torch.zeros(entry.shape, dtype=self._parameters[name].dtype))
            flat_sum = total.view(entry.shape[0], -1)
            for use in entry.outers:
                factors = clipping.factors(use.left.norm(dim=2) * use.right.norm(dim=2)).unsqueeze(2)
                flat_sum.addmm_((use.left * factors).flatten(0, 1).t(), use.right.flatten(0, 1))
            for use in entry.rows:
                factors = clipping.factors(use.values.norm(dim=2)).unsqueeze(2)
                flat_sum.index_add_(0, use.ids.flatten(), (use.values * factors).flatten(0, 1))
            if entry.whole is not None:
                each = entry.whole.reshape(entry.records, -1)
                total.view(-1).add_(clipping.factors(each.norm(dim=1)) @ each)
    return torch.zeros(objective.records)


@catches("clipping per token")
def test_clipping_per_token_is_caught(new_desk: Desks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token's gradient is clipped to the norm, and a record may count for as many norms as it has tokens.

    Claim: noise of sigma times the clipping norm. It is sigma over the reach of a record: at a reach of 10, ten passes
    at sigma 1 that say epsilon 17.9 have one above 500.
    Statistic: the reach, the norm of a record's part in the sum over the clipping norm; at most 1.
    Certain, both ways. It is found twice: the probe refuses before anything is spent, and without the probe the
    update shows it.
    """
    assert 0.99 < reach_of_a_record(new_desk, "right") <= 1
    monkeypatch.setattr(Booked, "add", clip_by_token)
    with pytest.raises(SensitivityError, match="nothing is released"):
        reach_of_a_record(new_desk, "probed")
    monkeypatch.setattr(probe, "check", lambda *_: None)
    reach = reach_of_a_record(new_desk, "by-token")
    claimed, spent = epsilon([Release(1.0, 1.0, 10)], 1e-5), epsilon([Release(1.0, 1 / reach, 10)], 1e-5)
    assert (reach > 10, claimed < 18, spent > 500) == (True, True, True)


# -- 4 -----------------------------------------------------------------------------------------------------------


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


@catches("a new accountant a round")
def test_a_new_accountant_a_round_is_caught(new_desk: Desks) -> None:
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


# -- 5 -----------------------------------------------------------------------------------------------------------


def difference_of_releases(new_desk: Desks, name: str) -> tuple[Values, float]:
    """Two releases of one sum over a site's records, one minus the other; and the deviation that it should have."""
    phase = {"rounds": 3, "sampling_rate": 1.0, "local_steps": 1, "clipping_norm": 0.7}
    desk = new_desk(name=name, config={"model": {"trainable": "full"}, "training": phase}, randomness=system)
    desk.write(desk.rows()[:20])  # of 100 declared: the divisor is 80, whatever was drawn
    start = desk.start()
    first, second = (desk.train(1, start, run=run) for run in ("first", "second"))
    return flat(first.update) - flat(second.update), 2**0.5 * first.noise_multiplier * 0.7 / 80


@catches("noise divided by the batch")
def test_noise_divided_by_the_batch_is_caught(new_desk: Desks) -> None:
    """The noise is made for the mean and added to the sum, or the sum is divided by those who were drawn.

    Claim: sigma 1; it is 1 over the batch of 80, and epsilon of one pass not 4.4 but above 3,500.
    Statistic: the sum of squares of two releases' difference, a chi-squared of 20,000 degrees.
    False alarm: 1e-6. Miss of a factor 80 or 4: below 1e-300, and of a factor 1.1 below 1e-6.
    """
    apart, deviation = difference_of_releases(new_desk, "right")
    low, high = chi2.ppf([ALARM / 2, 1 - ALARM / 2], apart.size)

    def accepts(values: Values) -> bool:
        return bool(low < float(np.square(values / deviation).sum()) < high)

    def miss(factor: float) -> float:
        return float(chi2.cdf(high / factor**2, apart.size) - chi2.cdf(low / factor**2, apart.size))

    assert accepts(apart)
    for old, new in (
        ("steps.noise_multiplier) / steps.divisor", "steps.noise_multiplier / steps.divisor) / steps.divisor"),
        ("steps.noise_multiplier) / steps.divisor", "steps.noise_multiplier / max(1, len(drawn))) / steps.divisor"),
        ("steps.noise_multiplier) / steps.divisor", "steps.noise_multiplier) / max(1, len(drawn))"),
    ):
        with planted(training.train, old, new):
            wrong, _ = difference_of_releases(
                new_desk, f"wrong-{hashlib.md5(new.encode(), usedforsecurity=False).hexdigest()[:6]}"
            )
            assert not accepts(wrong)
    assert max(miss(1 / 80), miss(4.0)) < 1e-300
    assert max(miss(1.1), miss(1 / 1.1)) < 1e-6
    assert epsilon([Release(1.0, 1.0, 1)], 1e-5) == pytest.approx(4.38, abs=0.01)
    assert epsilon([Release(1.0, 1 / 80, 1)], 1e-5) > 3500


# -- 6 -----------------------------------------------------------------------------------------------------------

DEPLOYED = inspect.signature(client.app.build).parameters["randomness"].default


def likeness_after_a_restart(new_desk: Desks, name: str, source: answers.Randomness) -> tuple[float, int]:
    """Squared cosine between two rounds' noises, each answered by a process begun from the same state; and their size.

    The site has no training records, so that what it sends is noise alone.
    """
    desk = new_desk(name=name, config={"model": {"trainable": "head"}}, randomness=source)
    desk.write(validation_rows(desk, desk.rows()))
    start, folder, noises = desk.start(), desk.site.ledger.parent, []
    for number in (1, 2):
        child = os.fork()
        if not child:
            try:
                np.save(folder / "noise.npy", flat(desk.train(number, start).update))
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        noises.append(np.load(folder / "noise.npy"))
    first, second = noises
    return float((first @ second) ** 2 / (first @ first) / (second @ second)), first.size


@catches("a seed reused after resume")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_seed_reused_after_resume_is_caught(new_desk: Desks, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that starts again begins its random numbers again, from a seed or from the run's name.

    Claim: epsilon of two rounds. Two releases under one noise have a difference without noise: epsilon is inf.
    Statistic: the squared cosine r² between two rounds' noises, which of independent ones is Beta(1/2, (d - 1)/2).
    False alarm: 1e-6, at r² = 0.3 of 66 values. Miss: 0, for one noise has r² = 1.
    """
    likeness, size = likeness_after_a_restart(new_desk, "right", DEPLOYED)
    limit = float(beta.isf(ALARM, 0.5, (size - 1) / 2))
    assert likeness < limit < 0.35

    def of_the_run(name: str) -> Keystream:
        return Keystream(hashlib.sha256(name.split("/")[0].encode()).digest())

    assert likeness_after_a_restart(new_desk, "of-the-run", of_the_run)[0] > 0.999
    seeded = random.Random(0)  # noqa: S311 - the bug
    monkeypatch.setattr(Keystream, "from_system", classmethod(lambda cls: cls(seeded.randbytes(32))))
    assert likeness_after_a_restart(new_desk, "seeded", DEPLOYED)[0] > 0.999


# -- 7 -----------------------------------------------------------------------------------------------------------


def agreements_of_clones(new_desk: Desks, name: str) -> tuple[int, int]:
    """Count the (record, round) pairs on which two exact clones of a site agree, drawing or not; and all pairs.

    Each record has a word of its own. Without noise, that word's row of the embedding moves if the record is drawn.
    """
    phase = {"rounds": 3, "sampling_rate": 0.5, "local_steps": 1}
    config = {"model": {"trainable": "full"}, "training": phase} | PLAIN
    desk = new_desk(name=name, config=config, site=NOT_PRIVATE, randomness=system)
    words = [word for word in desk.model.tokenizer.get_vocab() if word.isalpha()]
    desk.write([{"id": word, "text": word, "label": ("bad", "good")[k % 2]} for k, word in enumerate(words)])
    folder = desk.site.ledger.parent
    clone = shutil.copytree(folder, folder.parent / f"{name}-clone")
    twin = replace(desk, site=sites.load(clone / "site.toml"), resident=Resident())
    rows = [tokens[1] for tokens in desk.resident.parts(desk.site, desk.config).train.tokens]
    assert len(set(rows)) == len(rows) > 12
    start = desk.start()
    drawn = [
        [
            one.train(number, start).update["encoder.embeddings.word_embeddings.weight"][rows].any(1)
            for number in (1, 2, 3)
        ]
        for one in (desk, twin)
    ]
    return int((np.array(drawn[0]) == np.array(drawn[1])).sum()), 3 * len(rows)


@catches("sampling from the run's seed")
def test_sampling_from_the_runs_seed_is_caught(new_desk: Desks) -> None:
    """Who is drawn follows from what the coordinator knows, or from anything that a copy of the site has too.

    Claim: amplification by sampling; 400 steps at rate 1/40 and sigma 1 say epsilon 3.2. Who knows the samples knows
    in which steps a record was: one that was drawn 10 times, as is expected, has 17.9.
    Statistic: the pairs of record and round on which two exact clones agree. At rate 1/2 it is Binomial(pairs, 1/2).
    False alarm: 1e-6. Miss: 0, for under a common seed they agree on all.
    """
    agree, pairs = agreements_of_clones(new_desk, "right")
    limit = int(binom.isf(ALARM, pairs, 0.5))
    assert agree <= limit < pairs
    draw = "randomness.poisson_sample(len(examples), steps.sampling_rate)"
    for number, seeded in enumerate(
        (
            "np.flatnonzero(np.random.default_rng(config.seed + request.round).random(len(examples)) < steps.sampling_rate)",
            "(torch.manual_seed(config.seed), torch.rand(len(examples)) < steps.sampling_rate)[1].nonzero()[:, 0]",
            "Keystream(hashlib.sha256(f'{site.name} {request.run} {request.round}'.encode()).digest())"
            ".poisson_sample(len(examples), steps.sampling_rate)",
        )
    ):
        with planted(training.train, draw, seeded, np=np, hashlib=hashlib):
            assert agreements_of_clones(new_desk, f"seeded-{number}") == (pairs, pairs)


# -- 8 -----------------------------------------------------------------------------------------------------------


def tied_model() -> tuple[nn.Module, list[Objective], Objective]:
    """Make a small GPT-2 whose embedding is its output head too, losses of six made-up records alone, and together."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
        model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).train()
        ids = torch.randint(64, (6, 8))
    assert model.lm_head.weight is model.transformer.wte.weight

    def losses(ids: Tensor) -> Tensor:
        logits = model(ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.transpose(1, 2).double(), ids[:, 1:], reduction="none").mean(1)

    return model, [Objective((ids[n : n + 1],), losses) for n in range(6)], Objective((ids,), losses)


def reach_and_refusal(clip: float = 0.1) -> tuple[float, str]:
    """Largest norm of a record's part in the clipped sum, over the clipping norm; and what the probe says."""
    model, alone, together = tied_model()
    parameters = train_only(model, [name for name, _ in model.named_parameters()])
    with Gradients(model, parameters, "one-pass") as gradients:
        reach = 0.0
        for objective in alone:
            total = ClippedSum(gradients, Clipping(clip))
            total.add(objective)
            reach = max(reach, float(torch.stack([part.norm() for part in total.sums().values()]).norm()) / clip)
        try:
            probe.check(model, gradients, [(range(6), together)], alone)
        except SensitivityError as error:
            return reach, str(error)
        return reach, ""


@pytest.fixture
def albert(tiny_model: Path, tmp_path: Path) -> str:
    """Give the folder of a small ALBERT: two layers, and one layer's weights."""
    from transformers import AlbertConfig, AlbertModel, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tiny_model)
    words.save_pretrained(tmp_path / "albert")
    shape = {"embedding_size": 32, "hidden_size": 64, "intermediate_size": 256, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AlbertModel(AlbertConfig(vocab_size=len(words), **shape, **layers)).save_pretrained(tmp_path / "albert")
    return str(tmp_path / "albert")


@catches("an unclipped tied weight")
def test_an_unclipped_tied_weight_is_caught(new_desk: Desks, albert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that is used twice counts in the norm by one use, or without what the uses have in common.

    Claim: noise of sigma times the clipping norm; it is sigma over the reach of a record.
    Statistic: the reach: of a site's only record on an ALBERT, whose layers share their weights, and of single records on a
    GPT-2 whose embedding is its output head; and the probe's comparison with plain autograd.
    Certain, both ways, where a record has gradient by both uses.
    """
    assert 0.99 < reach_of_a_record(new_desk, "right", name=albert) <= 1
    last_use = "Entry(self.shape, self.records, self.outers[-1:], self.rows[-1:]).factors()"
    with planted(Entry.squared_norms, "self.factors()", last_use):
        with pytest.raises(SensitivityError, match="nothing is released"):
            reach_of_a_record(new_desk, "probed", name=albert)
        with monkeypatch.context() as patch:
            patch.setattr(probe, "check", lambda *_: None)
            assert reach_of_a_record(new_desk, "last-use", name=albert) > 1.01
    assert reach_and_refusal() == (pytest.approx(1.0, abs=2e-3), "")
    one_use = "outer, rows = self.factors()\n    rows = rows if outer is None else None"
    with planted(Entry.squared_norms, "outer, rows = self.factors()", one_use):
        reach, refusal = reach_and_refusal()
        assert reach > 1.05
        assert "nothing is released" in refusal
    with planted(Entry.squared_norms, "total + 2 * cross.sum((1, 2))", "total + 0 * cross.sum((1, 2))"):
        reach, refusal = reach_and_refusal()
        assert reach > 1.001
        assert "nothing is released" in refusal


# -- 9 -----------------------------------------------------------------------------------------------------------


def what_the_probe_saw(desk: Any) -> list[str]:
    """Answer three rounds with known random numbers; return every tensor that the probe was given."""
    seen: list[Tensor] = []
    streams = count()

    def note(right: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*given: Any) -> Any:
            for one in (each for part in given for each in (part if isinstance(part, list) else [part])):
                held = one[1] if isinstance(one, tuple) else one
                seen.extend(held.inputs if isinstance(held, Objective) else [held] if isinstance(held, Tensor) else [])
            return right(*given)

        return spy

    def known(cls: type[Keystream]) -> Keystream:
        return cls(hashlib.sha256(f"stream {next(streams)}".encode()).digest())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keystream, "from_system", classmethod(known))
        for name, function in inspect.getmembers(probe, inspect.isfunction):
            if not name.startswith("_") and function.__module__ == probe.__name__:
                patch.setattr(probe, name, note(function))
        for ask in (desk.train, desk.evaluate):
            ask(1), ask(2), ask(3)
    assert len(seen) > 20
    return [repr(value.tolist()) for value in seen]


def probes_alike(new_desk: Desks, new_rows: Rows, name: str) -> bool:
    """Whether two sites of other records, given the same random numbers, show the probe the same."""
    phase = {"rounds": 1, "sampling_rate": 0.5}
    others = [row | {"text": f"so {row['text']} so"} for row in new_rows(100)[:60]]
    seen = [
        what_the_probe_saw(new_desk(name=f"{name}-{number}", rows=rows, config={"warm_start": phase}))
        for number, rows in enumerate((None, others))
    ]
    return seen[0] == seen[1]


@catches("a probe on private records")
def test_a_probe_on_private_records_is_caught(new_desk: Desks, new_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe takes the site's own records: whether it refuses then depends on them, uncharged and without noise.

    Claim: nothing is spent by a probe. A bit of a record's own is delta 1 at any epsilon.
    Statistic: every tensor that the probe is given, at two sites of other records under the same random numbers.
    Certain, both ways: the same bytes, or not.
    """
    assert probes_alike(new_desk, new_rows, "right")
    right = training.EncoderPass.made_up

    def of_the_site(self: training.EncoderPass, *asked: Any, **how: Any) -> Any:
        def own(_: Any, lengths: Sequence[int] = made_up.LENGTHS) -> Examples:
            records = self._examples
            return Examples(tuple(t[:n] for t, n in zip(records.tokens, lengths, strict=False)), records.labels)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made_up, "examples", own)
            return right(self, *asked, **how)

    with monkeypatch.context() as patch:
        patch.setattr(training.EncoderPass, "made_up", of_the_site)
        assert not probes_alike(new_desk, new_rows, "tokens")
    scaled = "features *= torch.tensor("
    with planted(training.HeadPass.made_up, scaled, f"features = self._features[:4].clone(); {scaled}"):
        assert not probes_alike(new_desk, new_rows, "features")


# -- 10 ----------------------------------------------------------------------------------------------------------


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
                heads = [messages.NO_HEAD, *(event["row"] for event in export["events"])]
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
        logits = torch.cat([model.module(torch.tensor([t]), torch.ones(1, len(t))) for t in examples.tokens])
    return float(nn.functional.cross_entropy(logits, torch.tensor(examples.labels)))


@catches("a raw metric released")
def test_a_raw_metric_released_is_caught(new_desk: Desks, new_rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
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
    sent = 'return {"counts": noised.numpy()}'
    accuracy = "np.float32([np.trace(counts.sum(2)) / counts.sum()])"
    with planted(evaluation.evaluate, sent, f'return {{"counts": noised.numpy(), "accuracy": {accuracy}}}'):
        assert leaks(new_desk, new_rows, "scores") == ({"released names"}, 1)
    with planted(evaluation.evaluate, sent, 'return {"counts": (noised.numpy() * (counts > 0)).astype(np.float32)}'):
        differing, bare = leaks(new_desk, new_rows, "zeros")
        assert (differing, bare > 0) == (set(), True)


# -- 11 ----------------------------------------------------------------------------------------------------------


def answers_to_one_request(new_desk: Desks, name: str) -> tuple[int, int]:
    """Ask one question of each kind five times, warm and cold; count the answers that differ, and the charges."""
    desk = new_desk(name=name, config={"model": {"trainable": "head"}}, randomness=system)
    start, found = desk.start(), set()
    for number in range(5):
        found |= {messages.to_bytes(ask(1, start)) for ask in (desk.train, desk.evaluate)}
        if number == 2:
            desk.resident = Resident()
    return len(found), desk.spent()


@catches("a retry that draws new noise")
def test_a_retry_that_draws_new_noise_is_caught(new_desk: Desks, monkeypatch: pytest.MonkeyPatch) -> None:
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


# -- 12 ----------------------------------------------------------------------------------------------------------


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


@catches("a reservation not counted")
def test_a_reservation_not_counted_is_caught(new_desk: Desks) -> None:
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


# -- all of them ---------------------------------------------------------------------------------------------------


def test_every_bug_of_the_list_has_its_test_and_its_line_in_the_guide() -> None:
    assert tuple(CAUGHT) == BUGS
    assert all(name in globals() for name in CAUGHT.values())
    guide = (Path(__file__).parents[3] / "docs/guides/audits.md").read_text(encoding="utf-8")
    named = [line.split("|")[1].strip() for line in guide.splitlines() if line.startswith("| ")]
    assert tuple(name for name in named if name in BUGS) == BUGS
