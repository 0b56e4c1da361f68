"""Buffered rounds: what counts how much, in whatever order; who is asked what; and what a cut leaves."""

import math
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from timed import HEADS, Given, Stop, Timed

from server import buffered, checkpoints
from shared.errors import ConfigError, RunFailedError
from shared.run_config import RunConfig
from simulations import scenario

NAMES = ["north", "south", "west"]
PLAIN = {"server_optimizer": "sgd", "server_momentum": 0.0, "server_learning_rate": 1.0}
SPEEDS = {"north": 1.0, "south": 3.0, "west": 7.0}


@pytest.fixture
def federate(moonflower_home, tiny_scenario):
    """Lay out three sites whose heads are trained, in buffered rounds."""

    def lay_out(number=4, size=2, **settings):
        given = HEADS | {"warm_start.rounds": number} | {f"warm_start.{key}": value for key, value in PLAIN.items()}
        given |= {"federation.mode": "buffered", "federation.buffer_size": size, "federation.min_sites": 1}
        return Timed.lay_out(tiny_scenario, moonflower_home, given | {"dynamics.speed.step": 1.0} | settings)

    return lay_out


def steady(site, number, kind):
    return SPEEDS[site] if kind == "train" else 0.0


def filled(kind, site, number, reply):
    """Send an update that is the site's number all over."""
    value = np.float32({"north": 1.0, "south": 10.0, "west": 100.0}[site] * 2.0**-10)
    update = {name: np.full_like(array, value) for name, array in reply.update.items()} if kind == "train" else {}
    return replace(reply, update=update) if update else None


def moves(federation):
    """Give how far each round moved the head's first weight, in 2^-10."""
    folder, values = federation.home / "runs" / federation.run / "checkpoints", []
    for digest in federation.digests():
        state = checkpoints.read(folder, digest)
        values.append(float(next(array for name, array in state.iterate.items() if "head.weight" in name).ravel()[0]))
    return np.diff(values) * 2**10


def test_an_update_counts_the_less_the_older_it_is():
    assert [buffered.influence(age) for age in (0, 1, 3, 8)] == pytest.approx([1, 1 / math.sqrt(2), 1 / 2, 1 / 3])


def test_a_round_ends_with_its_buffers_last_update_and_late_ones_count_in_a_later_one_by_their_age(federate):
    federation = federate(5)
    federation.play(weather=Given(steady), change=filled)
    assert [each[:4] for each in federation.took_part() if each[2] == "ok"] == [
        (1, "north", "ok", 1),
        (1, "south", "ok", 1),
        (2, "north", "ok", 2),
        (2, "south", "ok", 2),
        (3, "west", "ok", 1),  # at 7: round 3 began at 6
        (3, "north", "ok", 3),
        (4, "north", "ok", 4),
        (4, "south", "ok", 3),
        (5, "north", "ok", 5),
        (5, "south", "ok", 5),
    ]
    assert federation.seconds() == pytest.approx([3.0, 3.0, 1.0, 2.0, 3.0])
    aged = [11 / 2, (100 / math.sqrt(3) + 1) / 2, (1 + 10 / math.sqrt(2)) / 2, 11 / 2]
    assert moves(federation) == pytest.approx(aged, rel=1e-4)


def test_who_is_at_work_at_the_end_of_a_round_stands_in_it(federate):
    federation = federate(3)
    federation.play(weather=Given(steady))
    pending = {(number, site): asked for number, site, outcome, asked in federation.took_part() if outcome == "pending"}
    assert pending[1, "west"] == pending[2, "west"] == 1
    assert {site for number, site in pending if number == 3} == {"south"}
    seconds = {(n, p.site): p.seconds for n, p in federation.history.participations(federation.run) if p.asked == 1}
    assert seconds[2, "west"] == pytest.approx(6.0)


def test_the_order_of_arrival_changes_no_bit(federate, tmp_path):
    first = federate(2, size=3)
    other = first.copy(tmp_path / "other")
    first.play(weather=Given(lambda site, *_: {"north": 1.0, "south": 2.0, "west": 3.0}[site]))
    other.play(weather=Given(lambda site, *_: {"north": 3.0, "south": 2.0, "west": 1.0}[site]))
    assert [part[1] for part in first.took_part()][:3] == [part[1] for part in other.took_part()][2::-1]
    assert first.digests() == other.digests()


def test_a_site_answers_a_question_once_and_no_more_than_was_planned(federate):
    draw = random.Random(4)  # noqa: S311 - how long sites take
    times = {(site, number): draw.uniform(0.5, 9.0) for site in NAMES for number in range(1, 13)}
    federation = federate(12, size=2, **{"federation.concurrency": 2})
    federation.play(weather=Given(lambda site, number, kind: times[site, number] if kind == "train" else 0.0))
    took = [(site, asked) for _, site, outcome, asked in federation.took_part() if outcome == "ok"]
    assert len(took) == 24
    assert max(Counter(took).values()) == 1
    assert max(Counter((n, site) for n, site, outcome, _ in federation.took_part()).values()) == 1
    for site in NAMES:
        charged = federation.charged(site)
        assert charged == sorted(set(charged))
        assert len(charged) <= 12
    spends = federation.history.spends(federation.run)
    told = Counter((spend.site, spend.part, spend.asked or number) for number, spend in spends)
    assert max(told.values()) == 1
    assert {key[::2] for key in told if key[1] == "train"} == set(took)
    assert all(spend.epsilon <= spend.budget for _, spend in spends)


def test_a_round_that_waits_on_does_not_ask_anew_who_has_answered(federate):
    settings = {"federation.deadline": 2.0, "federation.on_shortfall": "wait"}
    federation = federate(2, size=3, **settings)
    federation.play(weather=Given(steady), change=filled)
    assert [each[:3] for each in federation.took_part()] == [(n, site, "ok") for n in (1, 2) for site in NAMES]
    assert moves(federation) == pytest.approx([111 / 3], rel=1e-4)


def test_no_more_sites_are_at_work_than_the_concurrency(federate):
    class Watch(Stop):
        def __init__(self):
            super().__init__(0, 0)
            self.at_work, self.most = set(), 0

        def asked(self, number, kind, sites):
            self.at_work |= set(sites) if kind == "train" else set()
            self.most = max(self.most, len(self.at_work))

        def answered(self, number, kind, site, outcome, error):
            self.at_work.discard(site)

    watch = Watch()
    federate(6, size=2, **{"federation.concurrency": 2}).play(watch, weather=Given(steady))
    assert watch.most == 2


def test_an_update_that_is_too_old_is_charged_and_recorded_and_counts_for_nothing(federate, tmp_path):
    old = federate(5, **{"federation.max_staleness": 1})
    never = old.copy(tmp_path / "never")
    old.play(weather=Given(steady))
    never.play(weather=Given(lambda site, number, kind: 1e6 if site == "west" else steady(site, number, kind)))
    assert ("west", "failed", 1) in {each[1:] for each in old.took_part()}
    assert old.digests() == never.digests()
    assert any(spend.site == "west" and spend.asked == 1 for _, spend in old.history.spends(old.run))
    reasons = [part.error for _, part in old.history.participations(old.run) if part.error]
    assert "its update began in round 1, more than federation.max_staleness=1 rounds before." in reasons


def test_an_update_of_another_phase_counts_for_nothing(federate):
    federation = federate(2, **{"refit.rounds": 2})
    federation.play(weather=Given(steady))
    assert (3, "west", "failed", 1) in federation.took_part()
    assert federation.history.run(federation.run).status == "completed"


@pytest.mark.parametrize(("number", "answers"), [(1, 1), (2, 1), (3, 1), (3, 2), (4, 2)])
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(federate, tmp_path, number, answers):
    whole = federate(5)
    cut = whole.copy(tmp_path / "cut")
    whole.play(weather=Given(steady))
    with pytest.raises(KeyboardInterrupt):
        cut.play(Stop(number, answers), weather=Given(steady))
    cut.play(weather=Given(steady))
    assert cut.digests() == whole.digests()
    assert cut.took_part() == whole.took_part()
    assert cut.seconds() == pytest.approx(whole.seconds())
    assert [cut.charged(site) for site in NAMES] == [whole.charged(site) for site in NAMES]


def test_too_few_sites_end_the_run_or_not_as_is_set(federate):
    def change(kind, site, number, reply):
        if kind == "train" and site != "north":
            raise RuntimeError("broken")

    federation = federate(2)
    with pytest.raises(RunFailedError, match=r"round 1: 1 of the federation.buffer_size=2 updates came"):
        federation.play(weather=Given(steady), change=change)
    federation = federate(2, **{"federation.on_shortfall": "continue"})
    federation.play(weather=Given(steady), change=change)
    assert {site for _, site, outcome, _ in federation.took_part() if outcome == "ok"} == {"north"}


def config(**federation):
    base = {"model": {"name": "x"}, "task": {"labels": ["a", "b"]}, "training": {"rounds": 9, "sampling_rate": 0.1}}
    return RunConfig.model_validate({**base, "federation": federation})


def test_settings_that_do_not_go_together_are_refused_in_one_line(tiny_scenario):
    for settings, said in (
        ({"mode": "buffered"}, "needs federation.buffer_size"),
        ({"buffer_size": 3}, "is of buffered rounds"),
        ({"mode": "buffered", "buffer_size": 3, "sites_per_round": 3}, "federation.concurrency says"),
        ({"mode": "buffered", "buffer_size": 3, "min_fraction": 0.5}, "federation.min_fraction=0.5"),
        ({"mode": "buffered", "buffer_size": 3, "min_sites": 3, "aggregation": "median"}, "differ in age"),
    ):
        with pytest.raises(ValueError, match=said):
            config(**settings)
    assert config(mode="buffered", buffer_size=3, max_staleness=20).federation.checkpoints == 21
    with pytest.raises(ConfigError, match=r"federation.buffer_size=4 is above the 3 sites"):
        scenario.load(str(tiny_scenario), {"federation.mode": "buffered", "federation.buffer_size": 4})
