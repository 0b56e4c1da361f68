"""The weather of a study: frequencies as they are set, the same whoever asks and when; and runs in simulated time."""

import math
import statistics
from itertools import accumulate, takewhile

import pytest
from timed import HEADS, Given, Stop, Timed

from shared.errors import ConfigError
from simulations import dynamics, scenario
from simulations.dynamics import Budget, Churn, Dropout, Dynamics, Network, Speed, Weather
from simulations.timeline import Timeline

SITES = [f"site-{number}" for number in range(400)]
NAMES = ["north", "south", "west"]


def weather(seed=3, **sections):
    return Weather(Dynamics(**sections), seed)


@pytest.fixture
def federate(moonflower_home, tiny_scenario):
    """Lay out three sites whose heads are trained, a second a step."""

    def lay_out(number=3, **settings):
        given = HEADS | {"warm_start.rounds": number, "dynamics.speed.step": 1.0} | settings
        return Timed.lay_out(tiny_scenario, moonflower_home, given)

    return lay_out


# -- draws ----------------------------------------------------------------------------------------------------------


def test_sites_drop_out_as_often_as_is_set():
    asked = [(site, number) for site in SITES for number in range(1, 51)]
    dropped = [weather(dropout=Dropout(rate=0.3)).dropped(*each, "train") for each in asked]
    assert sum(each is not None for each in dropped) / len(asked) == pytest.approx(0.3, abs=0.01)
    assert all(0 < share < 1 for share in dropped if share is not None)
    assert all(weather().dropped(*each, "train") is None for each in asked[:1000])


def test_a_sites_own_rate_is_beta_distributed_around_the_rate():
    rates = [
        statistics.mean(drawn.dropped(site, number, "train") is not None for number in range(1, 101))
        for drawn in [weather(dropout=Dropout(rate=0.3, concentration=4.0))]
        for site in SITES
    ]
    assert statistics.mean(rates) == pytest.approx(0.3, abs=0.03)
    assert statistics.pvariance(rates) == pytest.approx(0.3 * 0.7 / 5 + 0.002, rel=0.2)  # and that of 100 draws


def test_speeds_are_lognormal_over_sites_and_over_a_sites_rounds():
    drawn = weather(speed=Speed(step=5.0, sigma=1.0))
    logs = [math.log(drawn.work(site, 1, "train", 2)) for site in SITES]
    assert statistics.mean(logs) == pytest.approx(math.log(10.0), abs=0.15)
    assert statistics.pstdev(logs) == pytest.approx(1.0, abs=0.1)
    assert len({drawn.work("site-1", number, "train", 2) for number in range(1, 20)}) == 1
    jittery = weather(speed=Speed(step=5.0, jitter=0.5))
    logs = [math.log(jittery.work("site-1", number, "train", 1)) for number in range(1, 401)]
    assert statistics.pstdev(logs) == pytest.approx(0.5, abs=0.05)


def test_bytes_take_time_by_the_sites_bandwidth():
    plain = weather(network=Network(bandwidth=1000.0, latency=0.5))
    assert plain.transfer("a", 4000) == 4.5
    assert weather(network=Network(latency=0.5)).transfer("a", 4000) == 0.5
    spread = weather(network=Network(bandwidth=1000.0, sigma=1.0))
    assert len({spread.transfer(site, 4000) for site in SITES}) == len(SITES)


def test_sites_come_late_and_stay_as_long_as_is_set():
    churn = Churn(late=0.25, arrival=100.0, lifetime=1000.0, absence=200.0)
    stays = {site: weather(churn=churn).stays(site) for site in SITES}
    first = {site: next(stay) for site, stay in stays.items()}
    late = [begin for begin, _ in first.values() if begin > 0]
    assert len(late) / len(SITES) == pytest.approx(0.25, abs=0.05)
    assert statistics.mean(late) == pytest.approx(100.0, rel=0.25)
    assert statistics.mean(end - begin for begin, end in first.values()) == pytest.approx(1000.0, rel=0.15)
    assert statistics.mean(next(stays[site])[0] - first[site][1] for site in SITES) == pytest.approx(200.0, rel=0.15)
    assert list(weather().stays("a")) == [(0.0, math.inf)]
    assert len(list(weather(churn=Churn(lifetime=10.0)).stays("a"))) == 1


def test_the_weather_is_the_seeds_alone():
    def drawn(seed, order):
        one = weather(seed, dropout=Dropout(rate=0.5, concentration=2.0), speed=Speed(sigma=1.0, jitter=1.0))
        asked = [(site, number) for site in SITES[:5] for number in range(1, 5)]
        told = {each: (one.dropped(*each, "train"), one.work(*each, "train", 1)) for each in sorted(asked, key=order)}
        return [told[each] for each in asked]

    assert drawn(1, lambda each: each) == drawn(1, lambda each: (-each[1], each[0]))
    assert drawn(1, lambda each: each) != drawn(2, lambda each: each)


def test_the_settings_are_a_scenarios(tiny_scenario):
    given = scenario.load(str(tiny_scenario), {"dynamics.dropout.rate": 0.1, "dynamics.network.bandwidth": 1e6})
    assert given.dynamics == Dynamics(dropout=Dropout(rate=0.1), network=Network(bandwidth=1e6))
    assert scenario.load(str(tiny_scenario), {}).dynamics is None
    with pytest.raises(ConfigError, match=r"dynamics.dropout.rate=1.0 must be below 1"):
        scenario.load(str(tiny_scenario), {"dynamics.dropout.rate": 1.0})
    assert dynamics.Budget(share=0.5).sigma == 0


# -- the clock ------------------------------------------------------------------------------------------------------


def test_the_clock_goes_from_arrival_to_arrival_whoever_finished_first():
    uploads, finished, preferred = {"a": 5.0, "b": 1.0, "c": 0.0}, [], []

    def finish(key, done):
        finished.append((key, done))
        return done + uploads[key], key

    clock = Timeline(10.0, finish, preferred.append, 2)
    for key, done in (("a", 11.0), ("b", 12.0), ("c", 30.0)):
        clock.works(key, done)
    assert clock.take({"a", "b", "c"}) is None
    times = []
    for until in (14.0, 100.0, 20.0, 100.0):
        clock.wait(0.0, until)
        times.append((clock.now(), clock.take({"a", "b", "c"})))
    assert times == [(13.0, "b"), (16.0, "a"), (20.0, None), (30.0, "c")]
    assert finished == [("a", 11.0), ("b", 12.0), ("c", 30.0)]
    assert all(len(keys) <= 2 for keys in preferred)
    clock.wait(0.0, 31.0)
    assert clock.now() == 31.0


def test_what_nobody_fetches_does_not_stop_the_clock():
    clock = Timeline(0.0, lambda key, done: (done, key), lambda keys: None, 1)
    clock.works("a", 1.0)
    clock.wait(0.0, 5.0)
    assert clock.take({"b"}) is None
    clock.wait(0.0, 5.0)
    assert (clock.now(), clock.take({"a"})) == (5.0, "a")


# -- runs -----------------------------------------------------------------------------------------------------------


def test_a_synchronous_round_takes_as_long_as_its_slowest_site(federate):
    federation = federate(**{"dynamics.speed.sigma": 1.0, "dynamics.speed.jitter": 0.5, "evaluation.every": 2})
    federation.play()
    drawn = Weather(Dynamics(speed=Speed(step=1.0, sigma=1.0, jitter=0.5)), 0)
    trained = [max(drawn.work(site, number, "train", 1) for site in NAMES) for number in (1, 2, 3)]
    scored = [0.0, *(max(drawn.work(site, number, "evaluate", 1) for site in NAMES) for number in (2, 3))]
    assert federation.seconds() == pytest.approx([sum(each) for each in zip(trained, scored, strict=True)], abs=1e-9)
    told = [part.seconds for number, part in federation.history.participations(federation.run) if number == 1]
    assert sorted(told) == pytest.approx(sorted(drawn.work(site, 1, "train", 1) for site in NAMES))


def test_a_late_answer_is_dropped_and_charged(federate):
    federation = federate(**{"federation.deadline": 10.0, "federation.on_shortfall": "continue"})
    slow = Given(lambda site, number, kind: 15.0 if (site, number) == ("west", 1) else 8.0)
    federation.play(weather=slow)
    assert federation.seconds() == pytest.approx([10.0, 8.0, 16.0])
    outcomes = {(number, site): outcome for number, site, outcome, _ in federation.took_part()}
    assert outcomes[1, "west"] == "timeout"
    assert (2, "west") not in outcomes  # still at work
    assert outcomes[3, "west"] == "ok"
    assert federation.charged("west") == [1, 3]
    assert federation.charged("north") == [1, 2, 3]
    spent = {(number, spend.site) for number, spend in federation.history.spends(federation.run)}
    assert (1, "west") not in spent
    assert any(
        "west, round 1 (train): its answer came" in event.text for event in federation.history.events(federation.run)
    )


def test_a_late_update_is_in_no_iterate(federate, tmp_path):
    late = federate(2, **{"federation.deadline": 10.0, "federation.on_shortfall": "continue"})
    never = late.copy(tmp_path / "never")
    late.play(weather=Given(lambda site, number, kind: 15.0 if (site, number) == ("west", 1) else 8.0))
    never.play(weather=Given(lambda site, number, kind: 1e6 if (site, number) == ("west", 1) else 8.0))
    assert late.digests() == never.digests()
    assert (late.charged("west"), never.charged("west")) == ([1], [])


def test_a_site_that_drops_out_is_heard_of_when_its_heartbeats_are_missed_and_charges_nothing(federate):
    federation = federate(
        4, **{"dynamics.dropout.rate": 0.4, "dynamics.dropout.notice": 7.0, "federation.min_sites": 1}
    )
    federation.play()
    drawn = Weather(Dynamics(dropout=Dropout(rate=0.4)), 0)
    gone = {(n, site) for n in range(1, 5) for site in NAMES if drawn.dropped(site, n, "train") is not None}
    assert gone
    assert {(number, site) for number, site, outcome, _ in federation.took_part() if outcome == "failed"} == gone
    for site in NAMES:
        assert federation.charged(site) == [number for number in range(1, 5) if (number, site) not in gone]
    times = {(n, p.site): p.seconds for n, p in federation.history.participations(federation.run) if p.kind == "train"}
    for number, site in gone:
        assert times[number, site] == pytest.approx(7.0 + drawn.dropped(site, number, "train"))


def test_sites_come_and_go_and_are_asked_while_they_are_there(federate):
    churn = Churn(late=0.5, arrival=3.0, lifetime=5.0, absence=2.0)
    settings = {f"dynamics.churn.{name}": value for name, value in churn.model_dump().items()}
    drawn = next(
        each
        for each in (Weather(Dynamics(churn=churn), seed) for seed in range(100))
        if [next(each.stays(site))[0] > 0 for site in NAMES] == [False, False, True]  # west comes late
    )
    settings |= {"seed": drawn.seed, "federation.min_sites": 1, "federation.on_shortfall": "wait"}
    federation = federate(12, **settings)
    federation.play()
    ends = [0.0, *accumulate(federation.seconds())]
    asked = {(number, site) for number, site, *_ in federation.took_part()}
    for number, site in asked:  # it had been there at some time of the round
        stays = takewhile(lambda stay, number=number: stay[0] <= ends[number], drawn.stays(site))
        assert any(end >= ends[number - 1] for _, end in stays)
    assert len(asked) < 12 * len(NAMES)
    assert any("joined before round" in event.text for event in federation.history.events(federation.run))


def test_a_run_that_was_cut_off_has_the_same_weather_and_the_same_end(federate, tmp_path):
    settings = {"speed.sigma": 1.0, "speed.jitter": 0.5, "dropout.rate": 0.2, "network.bandwidth": 1000.0}
    whole = federate(
        4, **{f"dynamics.{name}": value for name, value in settings.items()}, **{"federation.min_sites": 1}
    )
    cut = whole.copy(tmp_path / "cut")
    whole.play()
    with pytest.raises(KeyboardInterrupt):
        cut.play(Stop(3, 2))
    cut.play()
    assert cut.seconds() == pytest.approx(whole.seconds())
    assert cut.digests() == whole.digests()
    assert [(*each[:3], round(each[3])) for each in cut.took_part()] == whole.took_part()


def test_messages_worked_on_ahead_change_nothing(federate, tmp_path):
    settings = {"dynamics.speed.sigma": 1.0, "dynamics.dropout.rate": 0.2, "federation.min_sites": 1}
    one = federate(3, **settings)
    several = one.copy(tmp_path / "several")
    one.play()
    several.play(ahead=3)
    assert (several.digests(), several.seconds()) == (one.digests(), one.seconds())


def test_a_budget_that_others_share_ends_on_the_way_by_the_ledgers_own_word(federate):
    federation = federate(
        6, **{"dynamics.budget.share": 0.5, "federation.min_sites": 1, "federation.on_shortfall": "continue"}
    )
    with pytest.raises(Exception, match="lifetime epsilon"):
        federation.play()
    outcomes = [(number, site, outcome) for number, site, outcome, _ in federation.took_part()]
    assert [number for number, _, outcome in outcomes if outcome == "ok"] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    for site in NAMES:
        assert federation.charged(site) == [1, 2, 3]
    assert Budget(share=1.0).sigma == 0
