"""Twelve bugs that make a privacy claim untrue, each planted where a programmer would make it, and the audit that finds it.

An audit looks at what a site does through its public path, its answers to requests, and says whether one property of the
claim holds. Each test runs it on the code as it is and on the code with the bug, and states two chances. *False alarm*: that
the right code is refused. *Miss*: that the bug is not seen; 1 minus it is the power. Both are computed in the test from the
audit's null distribution, not guessed; where a property holds or not whatever is drawn, both are 0, and the test says
"certain". docs/guides/audits.md has the table.

Here are the bugs of sampling and noise; those of clipping and of releases are in the files beside.
"""

import ast
import hashlib
import inspect
import math
import os
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import kept
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import beta, binom, chi2

import client.app
from client import answers, training
from client import site as sites
from client.privacy.engine import SLACK
from client.privacy.randomness import Keystream
from client.resident import Resident
from shared.accounting import Release, epsilon
from shared.arrays import Arrays

ALARM = 1e-6  # the chance, at most, that an audit refuses right code
Desks = Callable[..., Any]
Planted = Callable[..., AbstractContextManager[None]]
Values = npt.NDArray[np.float64]
NOT_PRIVATE = {"privacy": {"allow_non_private": True}}
PLAIN = {"privacy": {"epsilon": math.inf}}  # what is summed can be seen


def system(_: str) -> Keystream:
    return Keystream.from_system()


def flat(update: Arrays) -> Values:
    return np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64)


# -- shuffling accounted as Poisson ----------------------------------------------------------------------------------


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


# -- an empty batch skipped ------------------------------------------------------------------------------------------


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


def test_an_empty_batch_skipped_is_caught(new_desk: Desks, planted: Planted) -> None:
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


# -- noise divided by the batch --------------------------------------------------------------------------------------


def difference_of_releases(new_desk: Desks, name: str) -> tuple[Values, float]:
    """Two releases of one sum over a site's records, one minus the other; and the deviation that it should have."""
    phase = {"rounds": 3, "sampling_rate": 1.0, "local_steps": 1, "clipping_norm": 0.7}
    desk = new_desk(name=name, config={"model": {"trainable": "full"}, "training": phase}, randomness=system)
    desk.write(desk.rows()[:20])  # of 100 declared: the divisor is 80, whatever was drawn
    start = desk.start()
    first, second = (desk.train(1, start, run=run) for run in ("first", "second"))
    return flat(first.update) - flat(second.update), 2**0.5 * first.noise_multiplier * 0.7 / 80


def test_noise_divided_by_the_batch_is_caught(new_desk: Desks, planted: Planted) -> None:
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
    noise, divisor = "noisy.noised(summed, steps.noise_multiplier)", "phase.learning_rate / steps.divisor"
    for number, (right, wrong) in enumerate(
        (
            (noise, "noisy.noised(summed, steps.noise_multiplier / steps.divisor)"),
            (noise, "noisy.noised(summed, steps.noise_multiplier / max(1, len(drawn)))"),
            (divisor, "phase.learning_rate / max(1, len(drawn))"),
        )
    ):
        with planted(training.train, right, wrong):
            apart, _ = difference_of_releases(new_desk, f"wrong-{number}")
            assert not accepts(apart)
    assert max(miss(1 / 80), miss(4.0)) < 1e-300
    assert max(miss(1.1), miss(1 / 1.1)) < 1e-6
    assert epsilon([Release(1.0, 1.0, 1)], 1e-5) == pytest.approx(4.38, abs=0.01)
    assert epsilon([Release(1.0, 1 / 80, 1)], 1e-5) > 3500


# -- a seed reused after resume --------------------------------------------------------------------------------------


DEPLOYED = inspect.signature(client.app.build).parameters["randomness"].default


def likeness_after_a_restart(new_desk: Desks, name: str, source: answers.Randomness) -> tuple[float, int]:
    """Squared cosine between two rounds' noises, each answered by a process begun from the same state; and their size.

    The site has no training records, so that what it sends is noise alone.
    """
    desk = new_desk(name=name, config={"model": {"trainable": "head"}}, randomness=source)
    desk.write(desk.validation_rows())
    start, folder, noises = desk.start(), desk.site.ledger.parent, []
    for number in (1, 2):
        child = os.fork()
        if not child:
            try:
                torch.set_num_threads(1)  # a forked child has none of its parent's threads
                np.save(folder / "noise.npy", flat(desk.train(number, start).update))
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        noises.append(np.load(folder / "noise.npy"))
    first, second = noises
    return float((first @ second) ** 2 / (first @ first) / (second @ second)), first.size


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


# -- sampling from the run's seed ------------------------------------------------------------------------------------


def agreements_of_clones(new_desk: Desks, name: str) -> tuple[int, int]:
    """Count the (record, round) pairs on which two exact clones of a site agree, drawing or not; and all pairs.

    Each record has a word of its own. Without noise, that word's row of the embedding moves if the record is drawn.
    """
    phase = {"rounds": 3, "sampling_rate": 0.5, "local_steps": 1}
    config = {"model": {"trainable": "full"}, "training": phase} | PLAIN
    desk = new_desk(name=name, config=config, site=NOT_PRIVATE, randomness=system)
    words = [word for word in desk.model.processor.get_vocab() if word.isalpha()]
    desk.write([{"id": word, "text": word, "label": ("bad", "good")[k % 2]} for k, word in enumerate(words)])
    folder = desk.site.ledger.parent
    clone = shutil.copytree(folder, folder.parent / f"{name}-clone")
    twin = replace(desk, site=sites.load(clone / "site.toml"), resident=Resident())
    rows = [ids[1] for ids in kept.tokens(desk.resident.parts(desk.site, desk.config).train)]
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


def test_sampling_from_the_runs_seed_is_caught(new_desk: Desks, planted: Planted) -> None:
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


# -- all of them -------------------------------------------------------------------------------------------------------

CAUGHT = {  # bug -> file and test
    "shuffling accounted as Poisson": ("bugs", "test_shuffling_accounted_as_poisson_is_caught"),
    "an empty batch skipped": ("bugs", "test_an_empty_batch_skipped_is_caught"),
    "clipping per token": ("clipping", "test_clipping_per_token_is_caught"),
    "a new accountant a round": ("releases", "test_a_new_accountant_a_round_is_caught"),
    "noise divided by the batch": ("bugs", "test_noise_divided_by_the_batch_is_caught"),
    "a seed reused after resume": ("bugs", "test_a_seed_reused_after_resume_is_caught"),
    "sampling from the run's seed": ("bugs", "test_sampling_from_the_runs_seed_is_caught"),
    "an unclipped tied weight": ("clipping", "test_an_unclipped_tied_weight_is_caught"),
    "a probe on private records": ("clipping", "test_a_probe_on_private_records_is_caught"),
    "a raw metric released": ("releases", "test_a_raw_metric_released_is_caught"),
    "a retry that draws new noise": ("releases", "test_a_retry_that_draws_new_noise_is_caught"),
    "a reservation not counted": ("releases", "test_a_reservation_not_counted_is_caught"),
}


def test_every_bug_of_the_list_has_its_test_with_its_chances_and_its_line_in_the_guide() -> None:
    here = Path(__file__)
    assert len(CAUGHT) == 12
    for file, test in CAUGHT.values():
        tree = ast.parse((here.parent / f"test_planted_{file}.py").read_text(encoding="utf-8"))
        (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == test)
        says = ast.get_docstring(found) or ""
        assert "Claim: " in says
        assert "Statistic: " in says
        assert "Certain" in says or ("False alarm: " in says and "Miss" in says)
    guide = (here.parents[3] / "docs/guides/audits.md").read_text(encoding="utf-8")
    named = [line.split("|")[1].strip() for line in guide.splitlines() if line.startswith("| ")]
    assert [name for name in named if name in CAUGHT] == list(CAUGHT)
