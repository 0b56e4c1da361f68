"""A run over real sites in one process: what is committed, what is not, and what a restart makes of it."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load_file, save_file

import client.app
from client.privacy import ledger_count
from client.privacy.randomness import Keystream
from client.site import load as load_site
from client.site import open_ledger
from server import checkpoints, job, rounds
from server.history.records import Ledger
from server.history.store import History
from server.observer import Log
from shared import accounting, messages, plan
from shared.errors import ConfigError, ModelError, NotFoundError, RunFailedError
from shared.messages import EvaluateReply, JoinReply, Refusal, TrainReply
from simulations import prepare, scenario
from simulations.grid import InProcessGrid

ROUNDS = 5
SITES = ["north", "south", "west"]


def fixed(request_id: str) -> Keystream:
    """Give the same draws for the same round and kind, whatever the run is called."""
    return Keystream(hashlib.sha256(request_id.partition("/")[2].encode()).digest())


@pytest.fixture(scope="module")
def whole(tiny_scenario, tmp_path_factory):
    """Give the tiny scenario's run, laid out and played without a stop; `fresh` is a copy from before that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONFLOWER_HOME", "")
        federation = lay_out(tiny_scenario, tmp_path_factory.mktemp("whole") / "home", {})
        federation.copy(federation.home.parent / "fresh")
        federation.result = federation.play()
        yield federation


@pytest.fixture
def fresh(whole, moonflower_home):
    """Give the same run, laid out and not begun."""
    return Federation(whole.run, whole.home.parent / "fresh").copy(moonflower_home)


@pytest.fixture
def federate(moonflower_home, tiny_scenario):
    """Lay out a run of the tiny scenario with other settings."""
    return lambda **settings: lay_out(tiny_scenario, moonflower_home, settings)


def lay_out(file, home, settings):
    os.environ["MOONFLOWER_HOME"] = str(home)
    home.mkdir(parents=True, exist_ok=True)
    with History.open(f"sqlite:///{home / 'history.db'}") as history:
        run = prepare.prepare(scenario.load(str(file), settings), history)
    return Federation(run, home)


class Federation:
    """A run that is laid out, and ways to play it."""

    def __init__(self, run: str, home: Path) -> None:
        self.run, self.home = run, home
        self.history = History.open(f"sqlite:///{home / 'history.db'}")

    def copy(self, home: Path) -> "Federation":
        shutil.copytree(self.home, home)
        return Federation(self.run, home)

    def play(self, observer=None, app_of=None, nodes=None):
        os.environ["MOONFLOWER_HOME"] = str(self.home)
        files = prepare.nodes(self.run)
        honest = client.app.build(client.app.site_from_context, fixed)
        grid = InProcessGrid(
            (app_of or (lambda inner: inner))(honest), files if nodes is None else {n: files[n] for n in nodes}
        )
        found = job.load(prepare.run_folder(self.run))
        return rounds.run(found, grid, self.history, observer or Log(), engine="in-process")

    def digests(self):
        return [item.checkpoint.digest for item in self.history.rounds(self.run)]

    def spent(self):
        """Give the spends, but for the account that a ledger opens for itself, and digests of its times."""
        return [
            (number, replace(spend, ledger_id="", ledger_head="")) for number, spend in self.history.spends(self.run)
        ]

    def outcomes(self, kind="train"):
        return {
            (number, item.site): (item.outcome, item.error)
            for number, item in self.history.participations(self.run)
            if item.kind == kind
        }


class Stop(Log):
    """Raise where a process could die."""

    def __init__(self, when: str, number: int) -> None:
        self.when, self.number, self.answers = when, number, 0

    def round_finished(self, done):
        if (self.when, self.number) == ("committed", done.number):
            raise KeyboardInterrupt

    def answered(self, number, kind, site, outcome, error):
        self.answers += number == self.number
        if self.when == f"answer {self.answers}" and number == self.number:
            raise KeyboardInterrupt


def tampered(change):
    """Wrap a ClientApp: `change(kind, site's node, honest reply)` gives the reply that is sent."""

    def wrap(inner):
        def answer(message: Message, context: Context) -> Message:
            reply = inner(message=message, context=context)
            kind = message.metadata.message_type
            changed = change(kind, context.node_id, reply.content)
            return Message(changed, reply_to=message) if changed is not None else reply

        return answer

    return wrap


def said(record, reply_kind):
    return messages.from_record(record, reply_kind)


def test_a_run_plays_all_its_rounds_and_its_history_is_complete(whole):
    run, history = whole.result, whole.history
    assert (run.status, run.rounds_done) == ("completed", ROUNDS)
    played = history.rounds(whole.run)
    assert [item.number for item in played] == [1, 2, 3, 4, 5]
    assert [item.phase for item in played] == ["warm_start", "training", "training", "training", "refit"]
    took_part = [(n, p.site, p.kind, p.outcome) for n, p in history.participations(whole.run)]
    evaluated = [2, 4, 5]  # every second, and the last
    assert sorted(took_part) == sorted(
        [(n, site, "train", "ok") for n in range(1, 6) for site in SITES]
        + [(n, site, "evaluate", "ok") for n in evaluated for site in SITES]
    )
    assert all(p.bytes_down > 0 < p.bytes_up and p.seconds > 0 for _, p in history.participations(whole.run))
    metrics = {(n, m.scope, m.site, m.name) for n, m in history.metrics(whole.run)}
    for n in range(1, 6):
        assert {(n, "test", None, name) for name in ("accuracy", "f1", "auc", "loss", "records")} <= metrics
    for n in evaluated:
        assert {(n, "validation", site, "f1") for site in [*SITES, None]} <= metrics
    assert {n for n, scope, *_ in metrics if scope == "validation"} == set(evaluated)


def test_the_epsilon_in_the_history_grows_to_the_budget_and_not_beyond(whole):
    for part, numbers in (("train", [1, 2, 3, 4, 5]), ("validation", [2, 4, 5])):
        for site in SITES:
            spent = [(n, s) for n, s in whole.history.spends(whole.run, site=site) if s.part == part]
            assert [n for n, _ in spent] == numbers
            epsilons = [s.epsilon for _, s in spent]
            assert epsilons == sorted(epsilons)
            assert 7.9 < epsilons[-1] <= 8.0
            assert {(s.dataset, s.delta, s.budget) for _, s in spent} == {(f"tiny.{site}", 1e-5, 8.0)}


def test_a_committed_round_has_its_checkpoint_and_older_ones_go(federate):
    federation = federate(**{"federation.keep_checkpoints": 2})
    federation.play()
    kept = {file.stem for file in (prepare.run_folder(federation.run) / "checkpoints").iterdir()}
    assert kept == set(federation.digests()[-2:])


def test_a_completed_run_is_not_run_again(whole):
    before = whole.digests()
    with pytest.raises(ConfigError, match="already completed"):
        whole.play()
    assert whole.digests() == before
    assert whole.history.run(whole.run).status == "completed"


@pytest.mark.parametrize("number", range(1, ROUNDS + 1))
def test_a_run_stopped_after_any_round_ends_as_if_it_had_not_been(whole, fresh, number):
    stopped = fresh
    with pytest.raises(KeyboardInterrupt):
        stopped.play(Stop("committed", number))
    assert len(stopped.digests()) == number
    assert stopped.history.run(stopped.run).status == "stopped"
    stopped.play()
    assert stopped.digests() == whole.digests()
    assert [a.outcome for a in stopped.history.attempts(stopped.run)] == ["stopped", "completed"]


@pytest.mark.parametrize("answers", [1, 3, 4, 6])
def test_a_run_stopped_between_an_answer_and_the_commit_resends_and_spends_nothing_more(whole, fresh, answers):
    stopped = fresh
    with pytest.raises(KeyboardInterrupt):
        stopped.play(Stop(f"answer {answers}", 2))
    assert len(stopped.digests()) == 1
    stopped.play()
    assert stopped.digests() == whole.digests()
    assert stopped.spent() == whole.spent()


def test_a_run_killed_by_the_system_is_a_lost_attempt_and_goes_on_to_the_same_bits(whole, fresh, tmp_path):
    killed = fresh
    script = tmp_path / "killed.py"
    script.write_text(
        f"""
import hashlib, os, signal
import client.app
from client.privacy.randomness import Keystream
from server import job, rounds
from server.history.store import History
from server.observer import Log
from simulations import prepare
from simulations.grid import InProcessGrid

class Kill(Log):
    def answered(self, number, kind, site, outcome, error):
        if (number, kind, site) == (3, "train", "south"):
            os.kill(os.getpid(), signal.SIGKILL)

fixed = lambda name: Keystream(hashlib.sha256(name.partition("/")[2].encode()).digest())
grid = InProcessGrid(client.app.build(client.app.site_from_context, fixed), prepare.nodes({killed.run!r}))
with History.open({f"sqlite:///{killed.home / 'history.db'}"!r}) as history:
    rounds.run(job.load(prepare.run_folder({killed.run!r})), grid, history, Kill(), engine="in-process")
""",
        encoding="utf-8",
    )
    environment = {**os.environ, "MOONFLOWER_HOME": str(killed.home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(killed.digests()) == 2
    killed.play()
    assert killed.digests() == whole.digests()
    assert [a.outcome for a in killed.history.attempts(killed.run)] == ["lost", "completed"]


def test_a_round_without_its_quorum_leaves_the_history_as_it_was_and_can_be_resumed(whole, fresh):
    failed = fresh

    def silent_in_round_3(kind, node, record):
        if kind == "train" and node != 1 and said(record, TrainReply).round == 3:
            return messages.to_record(Refusal(SITES[node - 1], "refused", "not today [privacy]"))
        return None

    with pytest.raises(RunFailedError, match=r"round 3: 1 of the federation.min_sites=2 .* not today \[privacy\]"):
        failed.play(app_of=tampered(silent_in_round_3))
    assert failed.digests() == whole.digests()[:2]
    assert {n for n, _ in failed.history.participations(failed.run)} == {1, 2}
    assert failed.history.run(failed.run).status == "failed"
    failed.play()
    assert failed.digests() == whole.digests()


def test_a_site_that_refuses_is_recorded_with_its_reason_and_the_others_go_on(fresh):
    federation = fresh

    def refuse(kind, node, record):
        if kind == "train" and node == 2:
            return messages.to_record(Refusal("south", "refused", "max_epsilon=1 is spent"))
        return None

    federation.play(app_of=tampered(refuse))
    assert federation.outcomes()[3, "south"] == ("refused", "max_epsilon=1 is spent")
    assert federation.outcomes()[3, "north"] == ("ok", None)
    assert not [s for _, s in federation.history.spends(federation.run, site="south") if s.part == "train"]


def with_update(record, change):
    reply = said(record, TrainReply)
    name = next(iter(reply.update))
    update = {**reply.update, name: change(reply.update[name])}
    return messages.to_record(TrainReply(**{**vars(reply), "update": update}))


def nan_inside(array):
    changed = array.copy()
    changed.flat[0] = np.nan
    return changed


def test_an_update_that_cannot_be_used_is_recorded_and_moves_nothing(federate, tmp_path):
    changes = [nan_inside, lambda a: a + np.float32(np.inf), lambda a: a + np.float32(1e30), lambda a: a[:1]]
    spoilt = federate(**{"warm_start.rounds": 4, "training.rounds": 0, "refit.rounds": 0})
    without = spoilt.copy(tmp_path / "without")

    def spoil(kind, node, record):
        if kind == "train" and node == 3:
            return with_update(record, changes[said(record, TrainReply).round - 1])
        return None

    def refuse(kind, node, record):
        refusal = Refusal("west", "refused", "no")
        return messages.to_record(refusal) if kind == "train" and node == 3 else None

    spoilt.play(app_of=tampered(spoil))
    without.play(app_of=tampered(refuse))
    assert spoilt.digests() == without.digests()
    reasons = ["is not finite", "is not finite", "is above", "are not the ones that were asked for"]
    for number, reason in enumerate(reasons, 1):
        outcome, error = spoilt.outcomes()[number, "west"]
        assert outcome == "failed"
        assert reason in error
    # The site has charged its ledger all the same, so the history says so.
    assert [n for n, s in spoilt.history.spends(spoilt.run, site="west") if s.part == "train"] == [1, 2, 3, 4]


def test_a_reply_at_odds_with_what_was_asked_is_recorded_as_failed_and_not_used(federate):
    nan, inf = float("nan"), float("inf")
    lies = [{"epsilon": nan}, {"epsilon": -1.0}, {"noise_multiplier": nan}, {"noise_multiplier": inf}]
    lies += [{"sampling_rate": 0.0}, {"sampling_rate": nan}, {"steps": 0}, {"site": "north"}, {"round": 1}]
    federation = federate(**{"warm_start.rounds": len(lies), "training.rounds": 0, "refit.rounds": 0})

    def lying(kind, node, record):
        if kind == "train" and node == 3:
            reply = said(record, TrainReply)
            return messages.to_record(TrainReply(**{**vars(reply), **lies[reply.round - 1]}))
        return None

    with pytest.raises(KeyboardInterrupt):  # the last lie is none in round 1
        federation.play(Stop("committed", len(lies)), app_of=tampered(lying))
    for number in range(1, len(lies) + 1):
        outcome, error = federation.outcomes()[number, "west"]
        assert outcome == "failed", lies[number - 1]
        assert "the reply" in error
    spent = [s.site for _, s in federation.history.spends(federation.run) if s.part == "train"]
    assert spent == ["north", "south"] * len(lies)


def test_a_histogram_that_was_not_asked_for_is_recorded_as_failed_and_not_summed(federate):
    empty = np.zeros((2, 2, 10), np.float32)
    histograms = [{"other": empty}, {"counts": empty[0]}, {"counts": empty + np.float32(np.nan)}]
    histograms.append({"counts": empty, "more": empty})
    federation = federate(**{"warm_start.rounds": 4, "training.rounds": 0, "refit.rounds": 0, "evaluation.every": 1})

    def lying(kind, node, record):
        if kind == "evaluate" and node == 3:
            reply = said(record, EvaluateReply)
            return messages.to_record(EvaluateReply(**{**vars(reply), "histogram": histograms[reply.round - 1]}))
        return None

    federation.play(app_of=tampered(lying))
    wrong = ("failed", "the histogram is not the one that was asked for.")
    assert [federation.outcomes("evaluate")[number, "west"] for number in (1, 2, 3, 4)] == [wrong] * 4
    scored = {m.site for _, m in federation.history.metrics(federation.run) if m.scope == "validation"}
    assert scored == {"north", "south", None}


def test_a_reply_that_is_no_message_of_ours_fails_that_site_alone(federate):
    federation = federate(**{"training.rounds": 0, "refit.rounds": 0})

    def garble(kind, node, record):
        if kind == "train" and node == 3:
            return RecordDict({"values": ConfigRecord({"message": "TrainReply"}), "update": ArrayRecord()})
        return None

    federation.play(app_of=tampered(garble))
    outcome, error = federation.outcomes()[1, "west"]
    assert outcome == "failed"
    assert "missing or unknown" in error


def test_two_nodes_with_one_name_end_the_run_before_its_first_round(fresh):
    federation = fresh

    def both_north(kind, node, record):
        if kind == "query":
            return messages.to_record(JoinReply(**{**vars(said(record, JoinReply)), "site": "north"}))
        return None

    with pytest.raises(RunFailedError, match="two nodes call themselves by one site's name"):
        federation.play(app_of=tampered(both_north))
    assert federation.digests() == []


@pytest.mark.parametrize(
    "lie",
    [
        {"records": 0},
        {"records": -5},
        {"site": "[/red]"},
        {"site": "x" * 500},
        {"dataset": "a\x1b[31m"},
        {"unit": "household"},
        {"unit": "person"},  # which the run's promise is not to
    ],
    ids=str,
)
def test_a_node_whose_declaration_cannot_be_does_not_join(fresh, lie):
    federation = fresh

    def lying(kind, node, record):
        if kind == "query" and node == 3:
            return messages.to_record(JoinReply(**{**vars(said(record, JoinReply)), **lie}))
        return None

    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("answer 2", 1), app_of=tampered(lying))
    events = [event.text for event in federation.history.events(federation.run) if "did not join" in event.text]
    assert len(events) == 1
    assert events[0].isprintable()


def test_too_few_sites_that_join_end_the_run_with_their_reasons(fresh):
    federation = fresh

    def refuse(kind, node, record):
        return messages.to_record(Refusal("x", "refused", "model.name is not allowed")) if node != 1 else None

    with pytest.raises(RunFailedError, match=r"1 of the federation.min_sites=2 sites joined; model.name is not"):
        federation.play(app_of=tampered(refuse))
    events = [event.text for event in federation.history.events(federation.run)]
    assert sum("did not join: model.name is not allowed" in text for text in events) == 2


def test_too_few_nodes_within_the_deadline_end_the_run(federate):
    federation = federate(**{"federation.deadline": 0.2})
    with pytest.raises(RunFailedError, match=r"1 of the federation.min_sites=2 sites are connected after 0.2 s"):
        federation.play(nodes=[1])


def test_a_site_that_crashes_is_named_and_the_run_goes_on(federate, caplog):
    federation = federate(**{"training.rounds": 0, "refit.rounds": 0})
    (prepare.run_folder(federation.run) / "sites" / "west" / "records.jsonl").write_text("no json\n")
    federation.play()
    assert {site for _, site in federation.outcomes()} == {"north", "south"}
    events = " ".join(event.text for event in federation.history.events(federation.run))
    assert "the site's data or machine is at fault; its own log says why." in events
    assert "no json" not in events


def test_a_run_whose_checkpoint_is_gone_says_so_and_stays_resumable(fresh):
    federation = fresh
    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 2))
    file = checkpoints.path(prepare.run_folder(federation.run) / "checkpoints", federation.digests()[-1])
    saved = file.read_bytes()
    file.unlink()
    with pytest.raises(NotFoundError, match="is missing; restore it"):
        federation.play()
    file.write_bytes(saved)
    assert federation.play().status == "completed"


def test_arrays_that_overflow_end_the_run_before_the_round_is_committed(federate):
    settings = {"server_optimizer": "sgd", "server_learning_rate": 3e38, "learning_rate": 100.0}
    federation = federate(**{f"warm_start.{name}": value for name, value in settings.items()})
    with pytest.raises(RunFailedError, match=r"warm_start.server_learning_rate below 3e\+38"):
        federation.play()
    assert federation.digests() == []


def test_a_cohort_is_the_same_whatever_attempt_draws_it(federate, tmp_path):
    settings = {"federation.sites_per_round": 2}
    whole = federate(**settings)
    stopped = whole.copy(tmp_path / "stopped")
    whole.play()
    with pytest.raises(KeyboardInterrupt):
        stopped.play(Stop("committed", 2))
    stopped.play()
    assert stopped.digests() == whole.digests()
    cohorts = [{site for number, site in whole.outcomes() if number == n} for n in range(1, 6)]
    assert {len(cohort) for cohort in cohorts} == {2}
    assert len({frozenset(cohort) for cohort in cohorts}) > 1


def test_a_run_without_privacy_is_recorded_as_such(federate):
    federation = federate(**{"privacy.epsilon": float("inf"), "training.rounds": 1})
    run = federation.play()
    assert run.private is False
    assert {s.epsilon for _, s in federation.history.spends(run.id)} == {float("inf")}
    assert {(m.low, m.high) for _, m in federation.history.metrics(run.id)} == {(None, None)}


# -- ledgers that go back, and budgets that end --------------------------------------------------------------------


def ledger_of(federation, site):
    """Give the ledger's files: a backup of the whole site takes the counter beside it along."""
    ledger = prepare.run_folder(federation.run) / "sites" / site / "ledger.db"
    return [ledger, ledger_count.file_of(ledger)]


def copied(files, folder):
    folder.mkdir(exist_ok=True)
    return [shutil.copy(file, folder) for file in files]


def warnings_of(federation):
    return [event.text for event in federation.history.events(federation.run) if event.level == "warning"]


def with_number(record, kind, number):
    return messages.to_record(replace(said(record, kind), ledger_number=number))


def test_the_ledgers_are_remembered_with_what_they_charged(whole):
    ledgers = {ledger.site: ledger for ledger in whole.history.ledgers().values()}
    assert {site: ledger.number for site, ledger in ledgers.items()} == dict.fromkeys(SITES, 8)  # 5 rounds, 3 scored
    assert all(ledger.simulated and ledger.dataset == f"tiny.{site}" for site, ledger in ledgers.items())
    for site in SITES:
        spends = [spend for _, spend in whole.history.spends(whole.run, site=site)]
        assert sorted(spend.ledger_number for spend in spends) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert {(spend.mechanism, spend.noise_source) for spend in spends} == {("gaussian", "aes-256-ctr")}
        assert {bool(spend.gradients) for spend in spends if spend.part == "train"} == {True}


def test_a_ledger_put_back_from_a_copy_does_not_join_again(fresh, tmp_path):
    federation = fresh
    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 1))
    backup = copied(ledger_of(federation, "west"), tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 3))
    copied(backup, ledger_of(federation, "west")[0].parent)
    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 4))
    assert (
        "the ledger of site west has gone back from 4 events to 1: restored from a backup?"
        in warnings_of(federation)[-1]
    )
    assert [n for n, site in federation.outcomes() if site == "west"] == [1, 2, 3]
    assert [n for n, site in federation.outcomes() if site == "north"] == [1, 2, 3, 4]


def test_a_sight_of_a_lost_attempt_counts(fresh, tmp_path):
    federation = fresh
    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 1))
    backup = copied(ledger_of(federation, "north"), tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("answer 3", 2))  # all three have answered; nothing is committed
    copied(backup, ledger_of(federation, "north")[0].parent)
    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 2))
    assert "site north has gone back from 2 events to 1" in " ".join(warnings_of(federation))
    assert federation.outcomes()[2, "south"] == ("ok", None)
    assert (2, "north") not in federation.outcomes()


def test_an_answer_with_a_number_that_was_used_is_not_used_and_its_site_not_asked_again(fresh, tmp_path):
    federation, without = fresh, fresh.copy(tmp_path / "without")

    def again(kind, node, record):
        if kind == "train" and node == 3 and said(record, TrainReply).round == 2:
            return with_number(record, TrainReply, 1)
        return None

    def refuse(kind, node, record):
        refusal = Refusal("west", "exhausted", "no")
        return (
            messages.to_record(refusal)
            if kind == "train" and node == 3 and said(record, TrainReply).round == 2
            else None
        )

    for run, change in ((federation, again), (without, refuse)):
        with pytest.raises(KeyboardInterrupt):
            run.play(Stop("committed", 3), app_of=tampered(change))
    said_so = "the ledger of site west has gone back from 1 events to 0: restored from a backup?"
    assert federation.outcomes()[2, "west"] == ("failed", said_so)
    assert [n for n, site in federation.outcomes() if site == "west"] == [1, 2]
    assert (2, "west") not in federation.outcomes("evaluate")
    assert federation.digests() == without.digests()
    # It was sent, so it was spent: the history counts it, used or not.
    assert [n for n, s in federation.history.spends(federation.run, site="west") if s.part == "train"] == [1, 2]


def test_a_histogram_with_a_number_that_was_used_is_not_scored(fresh):
    federation = fresh

    def again(kind, node, record):
        return with_number(record, EvaluateReply, 1) if kind == "evaluate" and node == 2 else None

    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 2), app_of=tampered(again))
    assert "has gone back from 2 events to 0" in federation.outcomes("evaluate")[2, "south"][1]
    scored = {(n, m.site) for n, m in federation.history.metrics(federation.run) if m.scope == "validation"}
    assert {site for _, site in scored} == {"north", "west", None}


def test_answers_that_overtake_those_of_another_run_are_no_rollback(fresh):
    federation = fresh

    def another_run_is_seen(kind, node, record):
        """While this site answers, another run's answer with a larger number has come in."""
        if kind == "train" and node == 1:
            reply = said(record, TrainReply)
            seen = Ledger(reply.ledger_id, "north", "tiny.north", reply.ledger_number + 5, True, federation.run)
            if reply.round == 2:
                federation.history.saw_ledgers([seen])
            return with_number(record, TrainReply, reply.ledger_number + (10 if reply.round > 2 else 0))
        if kind == "evaluate" and node == 1:
            return with_number(record, EvaluateReply, said(record, EvaluateReply).ledger_number + 10)
        return None

    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("answer 3", 3), app_of=tampered(another_run_is_seen))
    assert federation.outcomes()[2, "north"] == ("ok", None)
    assert not warnings_of(federation)


def test_a_site_whose_account_is_new_is_warned_of_and_takes_part_but_a_simulated_one_is_not_noted(federate):
    federation = federate(**{"training.rounds": 0, "refit.rounds": 0})
    old = Ledger("0a" * 16, "north", "tiny.north", 40, False, federation.run)
    federation.history.saw_ledgers([old, Ledger("0b" * 16, "south", "tiny.south", 40, True, federation.run)])
    found = job.load(prepare.run_folder(federation.run))
    assert found.simulated
    grid = InProcessGrid(client.app.build(client.app.site_from_context, fixed), prepare.nodes(federation.run))
    rounds.run(replace(found, simulated=False), grid, federation.history, Log(), engine="flower")
    (warning,) = warnings_of(federation)
    assert "site north keeps dataset tiny.north in another account than before (0a0a0a0a, 40 events; now " in warning
    assert federation.outcomes()[1, "north"] == ("ok", None)


def test_a_simulation_played_again_is_not_taken_for_a_rollback(federate):
    for _ in range(2):
        federation = federate(**{"training.rounds": 0, "refit.rounds": 0})
        federation.play()
        assert not warnings_of(federation)


def test_two_sites_that_answer_from_one_account_end_the_run_before_its_first_round(fresh):
    federation = fresh

    def one_account(kind, node, record):
        if kind == "query":
            return messages.to_record(replace(said(record, JoinReply), ledger_id="ab" * 16, ledger_number=0))
        return None

    with pytest.raises(RunFailedError, match="sites north and south answer from one account"):
        federation.play(app_of=tampered(one_account))
    assert federation.digests() == []


def test_a_site_out_of_budget_is_not_asked_again_and_the_run_goes_on(fresh):
    federation, asked = fresh, []

    def spent(kind, node, record):
        asked.append((kind, node))
        if kind == "train" and node == 2 and said(record, TrainReply).round == 2:
            return messages.to_record(Refusal("south", "exhausted", "0.1 is left of max_epsilon=8"))
        return None

    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 4), app_of=tampered(spent))
    assert federation.outcomes()[2, "south"] == ("exhausted", "0.1 is left of max_epsilon=8")
    assert (asked.count(("train", 2)), asked.count(("train", 1))) == (2, 4)
    assert ("evaluate", 2) not in asked
    assert warnings_of(federation) == ["site south is not asked again in this attempt: 0.1 is left of max_epsilon=8"]


def test_too_few_sites_with_budget_left_end_the_run_before_the_others_spend(fresh):
    federation, asked = fresh, []

    def spent(kind, node, record):
        asked.append((kind, node))
        if kind == "evaluate" and node != 1:
            return messages.to_record(Refusal(SITES[node - 1], "exhausted", "spent"))
        return None

    with pytest.raises(
        RunFailedError, match=r"round 3: 1 of the federation.min_sites=2 sites are left: .*south: spent"
    ):
        federation.play(app_of=tampered(spent))
    assert len(federation.digests()) == 2
    assert asked.count(("train", 1)) == 2


@pytest.mark.parametrize(
    "lie",
    [
        {"mechanism": "laplace"},
        {"mechanism": "none"},
        {"noise_source": "randn"},
        {"gradients": "\x1b[31m"},
        {"ledger_id": "not hexadecimal"},
        {"ledger_number": 0},
        {"ledger_number": 2**40},
        {"steps": 2**40},
        {"ledger_head": "ab"},
    ],
    ids=str,
)
def test_a_reply_whose_words_are_none_is_recorded_as_failed(fresh, lie):
    federation = fresh

    def lying(kind, node, record):
        return messages.to_record(replace(said(record, TrainReply), **lie)) if kind == "train" and node == 3 else None

    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 1), app_of=tampered(lying))
    outcome, error = federation.outcomes()[1, "west"]
    assert outcome == "failed"
    assert "the reply's" in error
    assert error.isprintable()


def test_a_run_does_not_resume_on_another_base_model(federate, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    federation = federate(**{"model.name": str(tmp_path / "model")})
    with pytest.raises(KeyboardInterrupt):
        federation.play(Stop("committed", 1))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 3] += 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="is not the model that the run began with"):
        federation.play()
    assert len(federation.digests()) == 1


def test_a_site_whose_budget_another_run_spends_meanwhile_is_exhausted_and_the_first_run_goes_on_without_it(federate):
    """Two runs on one dataset: each fits alone, and the first with the second does not."""
    first, second = federate(), federate()
    site_of = prepare.run_folder(first.run) / "sites" / "south"
    other = prepare.run_folder(second.run) / "sites" / "south"
    shutil.rmtree(other)
    other.symlink_to(site_of)  # the same records, split and ledger
    file = site_of / "site.toml"
    south = load_site(file)
    with open_ledger(south) as ledger:
        planned = plan.make(scenario_config(first), south.dataset.card())
        parts = [planned.releases(part) for part in ("train", "validation")]
        price = max(sum(accounting.rdp(release, ledger.order) for release in releases) for releases in parts)
        limit = accounting.rdp_to_epsilon(1.5 * price, ledger.order, 1e-5)
    file.write_text(file.read_text().replace("max_epsilon = 20.0", f"max_epsilon = {limit!r}"))

    class Meanwhile(Log):
        def round_finished(self, done):
            if done.number == 2:
                assert second.play().status == "completed"

    assert first.play(Meanwhile()).status == "completed"
    outcome, error = first.outcomes("evaluate")[4, "south"]  # the part whose releases cost more is spent first
    assert (outcome, "[privacy] max_epsilon" in error) == ("exhausted", True)
    assert [n for n, who in first.outcomes() if who == "south"] == [1, 2, 3, 4]
    assert [n for n, who in first.outcomes() if who == "north"] == [1, 2, 3, 4, 5]
    assert (5, "south") not in first.outcomes("evaluate")
    assert "site south is not asked again in this attempt: " in warnings_of(first)[-1]
    assert len([n for n, who in second.outcomes() if who == "south"]) == ROUNDS
    with open_ledger(load_site(file)) as ledger:
        assert ledger.lifetime_epsilon() <= limit
        assert {spend.question.run for spend in ledger.spends()} == {first.run, second.run}


def scenario_config(federation):
    return job.load(prepare.run_folder(federation.run)).config


RULES = {
    "factors trained": {
        "model.lora.train_a": True,
        "model.lora.rank": 2,
        "training.server_optimizer": "fedavg",
        "training.server_average": 0.0,
    },
    "median and Yogi": {
        "federation.aggregation": "median",
        "federation.min_sites": 3,
        "training.server_optimizer": "fedyogi",
        "training.proximal": 0.3,
    },
    "a norm's bound and Adagrad": {
        "federation.aggregation": "norm-bound",
        "federation.norm_bound": 0.2,
        "training.server_optimizer": "fedadagrad",
    },
}


@pytest.mark.parametrize("settings", RULES.values(), ids=RULES)
def test_a_run_of_any_rule_stopped_and_resumed_ends_as_if_it_had_not_been(federate, settings, tmp_path):
    whole = federate(**settings)
    stopped = whole.copy(tmp_path / "stopped")
    whole.play()
    for when, number in (("answer 2", 3), ("committed", 3)):
        with pytest.raises(KeyboardInterrupt):
            stopped.play(Stop(when, number))
    stopped.play()
    assert stopped.digests() == whole.digests()
    assert stopped.spent() == whole.spent()
    assert {path.suffix for path in job.load(prepare.run_folder(whole.run)).checkpoints.iterdir()} == {".safetensors"}


def test_a_hostile_site_moves_a_mean_and_not_a_median(federate):
    """A median of three is between two of them, and two are honest."""
    phases = {"warm_start.rounds": 1, "training.rounds": 0, "refit.rounds": 0, "federation.min_sites": 3}
    optimizer = {"warm_start.server_optimizer": "fedavg"}
    mean = federate(**phases, **optimizer)
    median = federate(**phases, **optimizer, **{"federation.aggregation": "median"})
    moved = {}

    def hostile(kind, node, record):
        return with_update(record, lambda a: a * 0 + np.float32(5.0)) if kind == "train" and node == 3 else None

    for name, federation in (("mean", mean), ("median", median)):
        federation.play(app_of=tampered(hostile))
        state = checkpoints.read(job.load(prepare.run_folder(federation.run)).checkpoints, federation.digests()[0])
        moved[name] = np.abs(state.iterate["head.weight"]).max()
        assert federation.outcomes()[1, "west"][0] == "ok"
    assert moved["mean"] > 1.5  # a third of what was sent
    assert moved["median"] < 0.5
