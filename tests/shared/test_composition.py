"""Compositions that are kept: the same figures as anew, every step counted, and quick after a thousand rounds."""

import itertools

import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

from shared import composition
from shared.accounting import Release, epsilon
from shared.composition import Groups

DELTA = 1e-5
GRID = [  # single mechanisms, and plans of several
    ([Release(rate, noise, steps)], DELTA)
    for rate, noise, steps in [
        (0.01, 0.8, 1000),
        (0.032, 1.0, 1600),
        (0.032, 4.0, 1600),
        (0.2, 2.0, 60),
        (0.5, 3.0, 100),
        (0.1, 6.0, 36),
        (0.004, 0.7, 3000),
    ]
] + [
    ([Release(0.1, 2.0, 30), Release(0.04, 1.2, 300)], DELTA),
    ([Release(0.3, 8.0, 10), Release(0.05, 1.1, 200), Release(0.3, 5.0, 10)], 1e-6),
]


@pytest.fixture(autouse=True)
def _nothing_kept() -> None:
    forget()


def forget() -> None:
    composition._kept.clear()
    for cached in (composition.pld_epsilon, composition._steps, composition._one_step):
        cached.cache_clear()


@pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha:UserWarning")  # of its search for a domain
@pytest.mark.parametrize(("releases", "delta"), GRID)
def test_epsilon_by_pld_is_within_one_percent_of_prvs(releases: list[Release], delta: float) -> None:
    accountant = PRVAccountant()
    accountant.history = [(r.noise_multiplier, r.sampling_rate, r.steps) for r in releases]
    ours = epsilon(releases, delta)
    upper = accountant.get_epsilon(delta, eps_error=ours * 2e-3)
    assert ours == pytest.approx(upper, rel=0.01)
    # ... and the comparison would see one step in twenty left out, or noise 3 % less than was used.
    assert (
        epsilon([Release(r.sampling_rate, r.noise_multiplier, r.steps * 19 // 20) for r in releases], delta)
        < 0.99 * upper
    )
    assert (
        epsilon([Release(r.sampling_rate, r.noise_multiplier * 0.97, r.steps) for r in releases], delta) > 1.01 * upper
    )


def growing(rounds: int) -> list[Release]:
    """Three phases of a run: two groups of sampled steps, and full batches at the end."""
    first, second = rounds // 3, rounds // 2
    return [
        Release(0.1, 4.0, 2) if number < first else Release(0.05, 1.3, 3) if number < second else Release(1.0, 60.0, 1)
        for number in range(rounds)
    ]


def test_epsilon_after_each_round_is_what_composing_anew_gives_to_the_last_bit() -> None:
    history = growing(36)
    kept = [epsilon(history[:rounds], DELTA) for rounds in range(1, 37)]
    anew = []
    for rounds in range(1, 37):
        forget()
        anew.append(epsilon(history[:rounds], DELTA))
    assert kept == anew


def test_each_step_more_costs_more_and_as_much_as_an_accountant_of_events_says() -> None:
    history = [Release(0.05, 1.3, 1), Release(0.1, 2.0, 1)] * 4
    kept = [epsilon(history[:rounds], DELTA) for rounds in range(1, 9)]
    assert all(before < after for before, after in itertools.pairwise(kept))
    accountant = PLDAccountant(value_discretization_interval=1e-4)
    for release, ours in zip(history, kept, strict=True):
        event = PoissonSampledDpEvent(release.sampling_rate, GaussianDpEvent(release.noise_multiplier))
        theirs = accountant.compose(event).get_epsilon(DELTA)
        assert ours == pytest.approx(theirs, rel=2e-3)


def test_the_order_of_rounds_changes_nothing_that_counts() -> None:
    history = growing(30)
    assert epsilon(history, DELTA) == pytest.approx(epsilon(history[::-1], DELTA), rel=1e-9)


def test_another_round_composes_no_earlier_group_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[float, float, int]] = []
    steps = composition._steps

    def counted(rate: float, noise: float, count: int, interval: float) -> object:
        asked.append((rate, noise, count))
        return steps(rate, noise, count, interval)

    monkeypatch.setattr(composition, "_steps", counted)
    groups: Groups = tuple((0.05, 1 + n / 10, 7) for n in range(12))
    composition.pld_epsilon(groups, DELTA)
    assert asked == list(groups)
    asked.clear()
    composition.pld_epsilon((*groups[:-1], (0.05, 2.1, 8)), DELTA)  # one step more of the last group
    composition.pld_epsilon((*groups, (0.07, 1.0, 1)), DELTA)  # a group more
    assert asked == [(0.05, 2.1, 8), (0.07, 1.0, 1)]


def test_what_is_kept_is_bounded() -> None:
    for n in range(30):
        composition.pld_epsilon(((0.05, 1 + n / 10, 7), (0.1, 2.0, 1)), DELTA)
    assert len(composition._kept) <= 8
