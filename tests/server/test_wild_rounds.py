"""Runs over nodes that are late, gone, new, renewed or lying: what counts, what is recorded, and how it ends."""

import hashlib
import os
import shutil
import sqlite3
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from grids import WildGrid
from hypothesis import given
from hypothesis import strategies as st

import client.app
from client.privacy.randomness import Keystream
from server import app, dispatch, job, joining, rounds
from server.history.records import Ledger
from server.history.store import History
from server.observer import Log
from shared import messages
from shared.certificates import new_node_key
from shared.errors import ConfigError, MachineError, RunFailedError
from shared.messages import EvaluateReply, JoinReply, Refusal, TrainReply
from shared.run_config import Federation as FederationConfig
from simulations import prepare, scenario

SITES = {1: "north", 2: "south", 3: "west"}
HEADS = {"training.rounds": 0, "refit.rounds": 0, "evaluation.every": 100}  # quick: the head alone


def fixed(request_id):
    return Keystream(hashlib.sha256(request_id.partition("/")[2].encode()).digest())


@pytest.fixture
def federate(moonflower_home, tiny_scenario, monkeypatch):
    """Lay out a run of `number` quick rounds."""
    monkeypatch.setattr(joining, "FIRST", 0.05)
    monkeypatch.setattr(dispatch, "LOOK", 0.1)

    def lay_out(number=3, **federation):
        settings = HEADS | {"warm_start.rounds": number} | {f"federation.{key}": v for key, v in federation.items()}
        moonflower_home.mkdir(parents=True, exist_ok=True)
        with History.open(f"sqlite:///{moonflower_home / 'history.db'}") as history:
            return Run(prepare.prepare(scenario.load(str(tiny_scenario), settings), history), moonflower_home)

    return lay_out


class Run:
    """A run that is laid out, and what became of it."""

    def __init__(self, run, home):
        self.run, self.home = run, home
        self.history = History.open(f"sqlite:///{home / 'history.db'}")

    def copy(self, home):
        shutil.copytree(self.home, home)
        return Run(self.run, home)

    def grid(self, change=lambda *_: None, nodes=None, **settings):
        """Give the sites' nodes; `change(type, node, round, honest reply)` gives what is sent instead, or None."""
        os.environ["MOONFLOWER_HOME"] = str(self.home)
        files = prepare.nodes(self.run)
        honest = client.app.build(client.app.site_from_context, fixed)

        def answer(message: Message, context: Context) -> Message:
            reply = honest(message=message, context=context)
            group = message.metadata.group_id
            number = int(group) if group.isdigit() else 0
            changed = change(message.metadata.message_type, context.node_id, number, reply.content)
            return reply if changed is None else Message(changed, reply_to=message)

        return WildGrid(answer, {n: files[of] for n, of in (nodes or {n: n for n in files}).items()}, **settings)

    def play(self, grid, observer=None, **settings):
        authenticated = settings.pop("authenticated", False)
        found = replace(job.load(prepare.run_folder(self.run)), simulated=False, sites=0, **settings)
        return rounds.run(found, grid, self.history, observer or Log(), engine="flower", authenticated=authenticated)

    def digests(self):
        return [item.checkpoint.digest for item in self.history.rounds(self.run)]

    def outcomes(self):
        took_part = [pair for pair in self.history.participations(self.run) if pair[1].kind == "train"]
        return {(number, item.site): item.outcome for number, item in took_part}

    def events(self):
        return [event.text for event in self.history.events(self.run)]


def refusal(node, outcome="refused"):
    return messages.to_record(Refusal(SITES[node], outcome, "not today"))


def without(missing):
    """Refuse the rounds and sites in `missing`."""
    return lambda kind, node, number, _: refusal(node) if kind == "train" and (number, SITES[node]) in missing else None


# -- late -----------------------------------------------------------------------------------------------------------


def test_a_late_update_is_in_no_round_and_its_site_takes_part_again_when_it_has_answered(federate, tmp_path):
    late = federate(5, deadline=0.6)
    punctual = late.copy(tmp_path / "punctual")

    def delay(node, kind, group):
        if kind != "train":
            return 0.0
        return 1.0 if (node, group) == (3, "2") else 0.3 if group in ("3", "4") else 0.0

    late.play(late.grid(delay=delay))
    outcomes = late.outcomes()
    assert outcomes[2, "west"] == "timeout"
    assert (3, "west") not in outcomes  # still at work on round 2
    assert outcomes[5, "west"] == "ok"
    dropped = [text for text in late.events() if text.startswith("site west, round 2 (train): its answer came ")]
    assert len(dropped) == 1
    absent = {(n, "west") for n in range(1, 6)} - {key for key, outcome in outcomes.items() if outcome == "ok"}
    punctual.play(punctual.grid(without(absent)))
    assert late.digests() == punctual.digests()
    spent = [number for number, spend in late.history.spends(late.run, site="west") if spend.part == "train"]
    assert 2 not in spent


def test_a_site_that_answers_twice_counts_once(federate, tmp_path):
    twice = federate(2)
    once = twice.copy(tmp_path / "once")
    grid = twice.grid()
    grid.twice = {2}
    twice.play(grid)
    once.play(once.grid())
    assert twice.digests() == once.digests()
    assert sum("site south" in text and "it answered twice" in text for text in twice.events()) >= 1


def test_nan_is_recorded_with_the_sites_name_and_moves_nothing(federate, tmp_path):
    spoilt = federate(2)
    sound = spoilt.copy(tmp_path / "sound")

    def spoil(kind, node, _, record):
        if kind != "train" or node != 3:
            return None
        reply = messages.from_record(record, TrainReply)
        return messages.to_record(replace(reply, update={k: a * np.float32(np.nan) for k, a in reply.update.items()}))

    spoilt.play(spoilt.grid(spoil))
    sound.play(sound.grid(without({(1, "west"), (2, "west")})))
    assert spoilt.digests() == sound.digests()
    assert spoilt.outcomes()[1, "west"] == "failed"


def test_a_noise_beyond_any_number_is_a_failed_answer_and_ends_no_run(federate):
    run = federate(1, min_sites=2)

    def boast(kind, node, _, reply):
        if kind != "evaluate" or node != 2:
            return None
        return messages.to_record(replace(messages.from_record(reply, EvaluateReply), noise_multiplier=1e200))

    assert run.play(run.grid(boast)).status == "completed"
    scored = {item.site: item.outcome for _, item in run.history.participations(run.run) if item.kind == "evaluate"}
    assert scored == {"north": "ok", "south": "failed", "west": "ok"}


def with_ledger(account, number):
    """Have site west join with another account."""
    changed = {"ledger_id": account, "ledger_number": number, "ledger_head": "0" * 64}

    def change(kind, node, _, reply):
        if (kind, node) != ("query", 3):
            return None
        return messages.to_record(replace(messages.from_record(reply, JoinReply), **changed))

    return change


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    ("owner", "known", "said"),
    [
        ("west", 50, "the ledger of site west has gone back from 50 events to 7: restored from a backup?"),
        ("south", 3, "site west answers from the account cdcdcdcd, which is site south's"),
    ],
)
def test_a_ledger_that_went_back_or_is_anothers_does_not_join_at_whatever_time(federate, late, owner, known, said):
    run, account = federate(4), "cd" * 16
    seen = Ledger(account, owner, f"tiny.{owner}", known, False, run.run)
    run.history.saw_ledgers([seen])
    grid = run.grid(with_ledger(account, 7))
    grid.away = {3} if late else set()
    run.play(grid, At(after1=grid.away.clear))
    assert {site for _, site in run.outcomes()} == {"north", "south"}
    assert any(said in text for text in run.events())
    assert run.history.ledgers([account])[account] == seen


def test_a_site_that_refuses_or_is_out_of_budget_holds_no_round_up(federate):
    run = federate(2, deadline=60.0)
    grid = run.grid(lambda kind, node, *_: refusal(node, "exhausted") if kind == "train" and node == 2 else None)
    grid.delay = lambda node, kind, group: 0.0
    started = time.monotonic()
    run.play(grid)
    assert time.monotonic() - started < 30
    assert [number for number, site in run.outcomes() if site == "south"] == [1]


# -- a quorum that is not there -------------------------------------------------------------------------------------


@given(least=st.integers(1, 20), share=st.integers(0, 1000).map(lambda n: n / 1000), asked=st.integers(1, 200))
def test_a_quorum_is_the_least_number_that_reaches_both_limits(least, share, asked):
    quorum = FederationConfig(min_sites=least, min_fraction=share).quorum(asked)
    exact = Fraction(round(share * 1000), 1000) * asked
    assert quorum >= least
    assert quorum >= exact
    assert quorum == least or quorum - 1 < exact


@pytest.mark.parametrize(
    ("share", "asked", "quorum"), [(0.7, 10, 7), (0.6, 5, 3), (0.28, 25, 7), (1.0, 9, 9), (0.34, 3, 2)]
)
def test_a_share_is_of_the_number_that_was_written(share, asked, quorum):
    assert FederationConfig(min_fraction=share).quorum(asked) == quorum


@pytest.mark.parametrize(("share", "goes_on"), [(0.66, True), (0.67, False)])
def test_two_of_three_are_a_quorum_of_two_thirds_and_no_more(federate, share, goes_on):
    run = federate(1, min_fraction=share)
    grid = run.grid(without({(1, "west")}))
    if goes_on:
        assert run.play(grid).status == "completed"
    else:
        with pytest.raises(
            RunFailedError, match=r"round 1: 2 of the 3 \(federation.min_fraction=0.67 of 3\) .* not today"
        ):
            run.play(grid)
        assert run.digests() == []


def test_a_shortfall_continues_with_those_that_answered_and_says_so(federate, tmp_path):
    short = federate(2, min_sites=3, on_shortfall="continue")
    enough = short.copy(tmp_path / "enough")
    missing = {(1, "south"), (1, "west")}
    short.play(short.grid(without(missing)))
    assert short.outcomes()[2, "west"] == "ok"
    assert "round 1: 1 of the federation.min_sites=3 sites sent an update; it goes on with them." in short.events()
    enough.play(enough.grid(without(missing)))
    assert short.digests() == enough.digests()


def test_a_shortfall_never_continues_with_none(federate):
    run = federate(1, on_shortfall="continue")
    with pytest.raises(
        RunFailedError, match=r"round 1: 0 of the federation.min_sites=2 sites sent an update; north: not today"
    ):
        run.play(run.grid(without({(1, site) for site in SITES.values()})))
    assert run.digests() == []


def test_a_run_that_waits_asks_those_missing_again_and_ends_as_if_they_had_been_there(federate, tmp_path):
    waits = federate(2, min_sites=3, on_shortfall="wait")
    there = waits.copy(tmp_path / "there")
    tries = {}

    def unready(kind, node, number, _):
        tries[kind, node, number] = tries.get((kind, node, number), 0) + 1
        return (
            refusal(node, "failed")
            if (kind, number) == ("train", 2) and node > 1 and tries[kind, node, number] < 3
            else None
        )

    assert waits.play(waits.grid(unready)).status == "completed"
    there.play(there.grid())
    assert waits.digests() == there.digests()
    assert tries["train", 1, 2] == 1  # it had answered
    assert waits.outcomes()[2, "west"] == "ok"
    assert len([n for n, _ in waits.history.participations(waits.run) if n == 2]) == 6
    assert len([s for n, s in waits.history.spends(waits.run) if (n, s.part) == (2, "train")]) == 3


def test_a_run_that_waits_takes_what_comes_after_the_deadline(federate, tmp_path):
    waits = federate(1, min_sites=3, on_shortfall="wait", deadline=0.3)
    there = waits.copy(tmp_path / "there")
    grid = waits.grid(delay=lambda node, kind, _: 0.8 if (node, kind) == (2, "train") else 0.0)
    waits.play(grid)
    there.play(there.grid())
    assert waits.digests() == there.digests()
    assert [kind for node, kind, _ in grid.pushed if node == 2] == ["query", "train", "evaluate"]


def test_an_answer_that_was_waited_for_is_not_taken_for_an_old_ledgers_where_another_run_went_on(federate):
    """Another run has had a later number of the same account by the time that this one asks again."""
    run = federate(1, deadline=0.5, min_sites=3, on_shortfall="wait", longest_wait=60.0)

    class Meanwhile(Log):
        def answered(self, number, kind, site, outcome, error):
            if outcome == "timeout":
                (ledger,) = [each for each in run.history.ledgers().values() if each.site == site]
                run.history.saw_ledgers([replace(ledger, number=ledger.number + 5)])

    late = run.grid(delay=lambda node, kind, group: 1.5 if (node, kind, group) == (2, "train", "1") else 0.0)
    assert run.play(late, Meanwhile()).status == "completed"
    assert run.outcomes()[1, "south"] == "ok"


def test_a_run_waits_no_longer_than_it_is_told(federate):
    run = federate(1, min_sites=3, on_shortfall="wait", longest_wait=0.5)
    started = time.monotonic()
    with pytest.raises(RunFailedError, match=r"2 of the federation.min_sites=3 sites sent an update; west: not today"):
        run.play(run.grid(without({(1, "west")})))
    assert 0.5 < time.monotonic() - started < 20


# -- sites that come and go -----------------------------------------------------------------------------------------


class At(Log):
    """Do something when a round has been committed."""

    def __init__(self, **actions):
        self.actions = {int(key.strip("after")): action for key, action in actions.items()}

    def round_finished(self, done):
        self.actions.get(done.number, lambda: None)()


def test_a_site_that_connects_later_takes_part_from_then_on_and_one_that_is_away_is_not_asked(federate):
    run = federate(6)
    grid = run.grid(delay=lambda node, kind, group: 0.0)
    grid.away = {3}
    run.play(grid, At(after2=grid.away.clear, after4=lambda: grid.away.add(1)))
    took_part = {site: [n for n, who in run.outcomes() if who == site] for site in SITES.values()}
    assert took_part["south"] == [1, 2, 3, 4, 5, 6]
    assert took_part["west"] == [4, 5, 6]  # asked to join in round 3
    assert took_part["north"] == [1, 2, 3, 4]
    assert "site west joined before round 4." in run.events()
    assert set(run.outcomes().values()) == {"ok"}


def test_a_site_whose_key_was_renewed_comes_back_as_another_node(federate):
    run = federate(6)
    grid = run.grid(nodes={1: 1, 2: 2, 3: 3, 4: 3})
    grid.away = {4}

    def renewed():
        grid.away = {3}

    run.play(grid, At(after2=renewed))
    assert [n for n, site in run.outcomes() if site == "west"] == [1, 2, 4, 5, 6]
    assert {node for node, kind, group in grid.pushed if (kind, group) == ("train", "6")} == {1, 2, 4}


def test_a_renewed_key_counts_at_once_though_the_old_one_still_seems_connected(federate):
    run = federate(6)
    keys = enrolled(run, SITES)
    grid = run.grid(nodes={1: 1, 2: 2, 3: 3, 4: 3}, keys=keys)

    def renewed():
        _, line = new_node_key()
        run.history.enrol("west", line, renew=True)
        grid.keys[4] = pem(line)

    run.play(grid, At(after2=renewed), supervised=True, authenticated=True)
    assert [n for n, site in run.outcomes() if site == "west"] == [1, 2, 4, 5, 6]
    assert {node for node, kind, group in grid.pushed if (kind, group) == ("train", "6")} == {1, 2, 4}


def test_a_second_node_of_a_connected_site_is_refused_and_the_run_goes_on(federate):
    run = federate(4)
    grid = run.grid(nodes={1: 1, 2: 2, 3: 3, 4: 3})
    grid.away = {4}
    run.play(grid, At(after1=grid.away.clear))
    assert "node 4 did not join: site west is connected as another node, too; stop one of them." in run.events()
    assert {node for node, kind, _ in grid.pushed if kind == "train"} == {1, 2, 3}


def test_a_node_that_refuses_to_join_is_asked_again_when_it_connects_anew(federate):
    run = federate(5)
    tries = []

    def unwilling(kind, node, *_):
        tries.extend([node] if kind == "query" else [])
        return refusal(node) if kind == "query" and node == 3 and grid.starts.get(3, 0) == 0 else None

    grid = run.grid(unwilling)
    run.play(grid, At(after3=lambda: grid.starts.update({3: 1})))
    assert tries == [1, 2, 3, 3]
    assert [n for n, site in run.outcomes() if site == "west"] == [5]


def test_a_run_begins_when_enough_sites_have_connected(federate):
    run = federate(1, deadline=20.0)
    grid = run.grid()
    grid.away = {1, 2, 3}
    threading.Timer(0.5, grid.away.clear).start()
    assert run.play(grid, supervised=True).status == "completed"


def test_a_round_waits_for_sites_that_are_away_and_its_budget_is_not_spent_before(federate):
    run = federate(3, deadline=20.0)
    grid = run.grid()

    def alone():
        grid.away = {2, 3}
        threading.Timer(0.5, grid.away.clear).start()

    assert run.play(grid, At(after1=alone)).status == "completed"
    assert {n: sum(number == n for number, _ in run.outcomes()) for n in (1, 2, 3)} == {1: 3, 2: 3, 3: 3}


# -- who is who -----------------------------------------------------------------------------------------------------


def enrolled(run, nodes):
    """Enrol a key for each node's site; give the keys as a SuperLink does."""
    keys = {}
    for node, site in nodes.items():
        _, line = new_node_key()
        run.history.enrol(site, line)
        keys[node] = pem(line)
    return keys


def pem(line):
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    return load_ssh_public_key(line.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_a_site_is_what_its_key_was_enrolled_under(federate):
    run = federate(2)
    keys = enrolled(run, SITES)
    assert run.play(run.grid(keys=keys), supervised=True, authenticated=True).status == "completed"
    assert set(run.outcomes()) == {(n, site) for n in (1, 2) for site in SITES.values()}


def test_a_name_that_another_key_was_enrolled_under_is_refused(federate):
    run = federate(2)
    keys = enrolled(run, {1: "north", 2: "south", 3: "elsewhere"})

    run.play(run.grid(keys=keys), supervised=True, authenticated=True)
    assert {site for _, site in run.outcomes()} == {"north", "south"}
    said = "elsewhere did not join: the node calls itself 'west', and its key is enrolled for 'elsewhere'."
    assert said in run.events()


def test_a_node_whose_key_nobody_enrolled_or_that_was_revoked_is_not_asked(federate):
    run = federate(3)
    keys = enrolled(run, SITES)
    grid = run.grid(keys=keys | {3: b"no key"})
    run.play(
        grid,
        At(after1=lambda: run.history.revoke("south")),
        supervised=True,
        authenticated=True,
        config=run_config(run),
    )
    assert {node for node, *_ in grid.pushed} == {1, 2}
    assert [n for n, site in run.outcomes() if site == "south"] == [1]


def run_config(run):
    found = job.load(prepare.run_folder(run.run)).config
    return found.model_copy(update={"federation": FederationConfig(min_sites=2, on_shortfall="continue", deadline=0.5)})


# -- how it ends ----------------------------------------------------------------------------------------------------


class Raise(Log):
    def __init__(self, error):
        self.error = error

    def round_finished(self, done):
        raise self.error


@pytest.mark.parametrize(
    ("error", "outcome", "status"),
    [
        (OSError(28, "No space left on device"), "failed", "running"),
        (MachineError("the SuperLink is gone"), "failed", "running"),
        (KeyboardInterrupt(), "stopped", "running"),
        (SystemExit(1), "stopped", "running"),
        (RunFailedError("too few sites"), "failed", "failed"),
        (ConfigError("no such model"), "failed", "failed"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_the_machines_fault_ends_a_supervised_attempt_and_not_its_run(federate, error, outcome, status):
    run = federate(2)
    with suppress(BaseException):
        run.play(run.grid(), Raise(error), supervised=True)
    assert run.history.attempts(run.run)[-1].outcome == outcome
    assert run.history.run(run.run).status == status
    if status == "running":
        assert run.play(run.grid(), supervised=True).status == "completed"


def test_an_interrupted_run_that_nobody_supervises_is_stopped(federate):
    run = federate(2)
    with pytest.raises(KeyboardInterrupt):
        run.play(run.grid(), Raise(KeyboardInterrupt()))
    assert run.history.run(run.run).status == "stopped"


def test_a_stop_that_was_requested_ends_the_run_after_the_round_without_a_signal(federate):
    run = federate(4)
    with closing(sqlite3.connect(run.home / "history.db")) as database, database:
        database.execute("UPDATE runs SET origin = 'daemon'")
    with pytest.raises(RunFailedError, match="a stop was requested"):
        run.play(run.grid(), At(after2=lambda: run.history.request_stop(run.run)), supervised=True)
    assert len(run.digests()) == 2
    assert run.history.run(run.run).status == "stopped"
    assert run.history.attempts(run.run)[-1].outcome == "stopped"


def test_watchers_read_who_is_asked_who_answered_and_who_was_late(federate):
    run = federate(3, deadline=2.5)
    run.history.close()
    grid = run.grid(
        delay=lambda node, kind, group: {("3", "1"): 3.0, ("1", "2"): 0.5, ("1", "3"): 0.5}.get((str(node), group), 0.0)
    )
    settings = {
        "run": str(prepare.run_folder(run.run)),
        "database": f"sqlite:///{run.home / 'history.db'}",
        "engine": "flower",
    }
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=settings)
    app.build(Log())(grid, context)
    run = Run(run.run, run.home)
    told = [(line.round, line.kind, line.site, line.state) for line in run.history.progress(run.run)]
    assert [line for line in told if line[1] == "round"] == [
        (n, "round", None, state) for n in (1, 2, 3) for state in ("started", "committed")
    ]
    assert {(0, "join", site, "ok") for site in SITES.values()} <= set(told)
    assert (1, "train", "west", "asked") in told
    assert (1, "train", "west", "timeout") in told
    assert (1, "train", "north", "ok") in told
    assert told.index((0, "run", None, "joined")) < told.index((1, "round", None, "started"))


def test_a_run_is_played_by_one_process_at_a_time(federate):
    run = federate(1)
    settings = {"run": str(prepare.run_folder(run.run)), "database": "", "engine": "flower"}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=settings)
    from shared import locks

    with (
        locks.hold(prepare.run_folder(run.run) / job.LOCK, "run x"),
        pytest.raises(ConfigError, match="is in use by process"),
    ):
        app.build(Log())(run.grid(), context)
    assert run.history.attempts(run.run) == []
