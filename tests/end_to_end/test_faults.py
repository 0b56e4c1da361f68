"""Whatever dies, in whatever stage of a round, a run over real machines completes: each round once, every release in a ledger.

One federation plays one run; in each round something else is killed. What a person would start again (the daemon, a
node) the test starts again; everything else must come back by itself.
"""

import hashlib
import json
import resource
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machines as federations
import pytest
from machines import Cable, Machines

from server.history.store import History

SITES = {"north": 60, "south": 80, "west": 100}
STAGES = ("selection", "training", "upload", "aggregation", "evaluation", "commit")
ROLES = ("daemon", "superlink", "serverapp", "supernode:north", "worker:north", "node:north")
QUICK = (
    ("serverapp", "training"),
    ("worker:north", "training"),
    ("superlink", "aggregation"),
    ("supernode:north", "upload"),
    ("daemon", "evaluation"),
)
WILD = """
        min_sites = 2
        deadline = 20.0
        on_shortfall = "wait"
"""
Fault = tuple[str, str]


@pytest.fixture
def machines(tmp_path: Path, tiny_model: Path) -> Iterator[Machines]:
    made = federations.provisioned(tmp_path / "f", SITES, model=str(tiny_model))
    yield made
    made.end()


class Stages:
    """Tells from the history and the ledgers in which stage a round is."""

    def __init__(self, machines: Machines, history: History, run: str, number: int) -> None:
        self.machines, self.history, self.run, self.number = machines, history, run, number
        self.seen = 0
        self.rows: list[tuple[str, str | None, str]] = []

    def answered(self, kind: str) -> set[str | None]:
        return {site for row, site, state in self.rows if row == kind and state not in {"asked", "late"}}

    def asked(self, kind: str) -> set[str | None]:
        return {site for row, site, state in self.rows if row == kind and state == "asked"}

    def charged(self, kind: str) -> set[str]:
        request = f"{self.run}/{self.number}/{kind}"
        return {name for name in SITES if any(row[1] == request for row in self.machines.ledger(name))}

    def reached(self, stage: str) -> bool:
        for item in self.history.progress(self.run, after=self.seen):
            self.seen = item.id
            if item.round == self.number:
                self.rows.append((item.kind, item.site, item.state))
        match stage:
            case "selection":
                return any(kind == "round" and state == "started" for kind, _, state in self.rows)
            case "training":
                return bool(self.asked("train")) and not self.answered("train")
            case "upload":
                return "north" in self.charged("train") and "north" not in self.answered("train")
            case "aggregation":
                return bool(self.answered("train")) and not self.asked("evaluate")
            case "evaluation":
                return bool(self.asked("evaluate"))
            case _:  # commit: the last answer is in
                return self.asked("evaluate") <= self.answered("evaluate") and bool(self.asked("evaluate"))


def play(machines: Machines, run: str, faults: dict[int, Callable[[], None]], stages: dict[int, str]) -> None:
    """Wait for each faulty round's stage, and let the fault happen."""
    with machines.history() as history:
        for number in sorted(faults):
            stage = Stages(machines, history, run, number)
            machines.wait_for(
                lambda stage=stage, wanted=stages[number]: stage.reached(wanted),
                f"{stages[number]} of round {number}",
                every=0.003,
            )
            faults[number]()


def kill(machines: Machines, role: str) -> None:
    """Kill a process, and start again what only a person starts."""
    machines.kill(role)
    kind, _, site = role.partition(":")
    if kind == "daemon":
        machines.start_server()
    elif kind == "node":
        machines.start_site(site)


def submitted(machines: Machines, model: Path, rounds: int, extra: str = WILD, **settings: object) -> str:
    machines.start_all()
    text = federations.tiny_run(str(model), rounds=rounds, sites=2).replace("min_sites = 2", extra)
    config = machines.folder / "run.toml"
    config.write_text(text, encoding="utf-8")
    assert not settings
    return machines.submit(config)


def assert_finished_and_accounted_for(machines: Machines, run: str, rounds: int) -> None:
    """Assert what holds of a finished run, whatever happened to its processes on the way."""
    finished = machines.wait_until_finished(run, patience=1200)
    with machines.history() as history:
        attempts = [(item.outcome, item.error) for item in history.attempts(run)]
        assert finished.status == "completed", attempts
        played = history.rounds(run)
        released = [(number, item) for number, item in history.participations(run) if item.outcome == "ok"]
        spends = history.spends(run)
    assert [item.number for item in played] == list(range(1, rounds + 1))
    last = played[-1].checkpoint
    content = (machines.state / "runs" / run / "checkpoints" / f"{last.digest}.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == last.digest
    for name in SITES:
        requests = [request for of_run, request, _, _ in machines.ledger(name) if of_run == run]
        assert len(requests) == len(set(requests)), f"{name} spent twice for one request"
        for number, item in released:
            if item.site == name:
                assert f"{run}/{number}/{item.kind}" in requests
    assert max(spend.epsilon for _, spend in spends) <= 8
    assert all(any(item.kind == "train" and number == at for at, item in released) for number in range(1, rounds + 1))


def faulty_run(machines: Machines, model: Path, faults: list[Fault]) -> None:
    rounds = len(faults) + 1
    run = submitted(machines, model, rounds)
    acts = {
        number: (lambda role=role: [kill(machines, each) for each in role.split("+")] and None)
        for number, (role, _) in enumerate(faults, 1)
    }
    try:
        play(machines, run, acts, {number: stage for number, (_, stage) in enumerate(faults, 1)})
        assert_finished_and_accounted_for(machines, run, rounds)
    finally:
        print(machines.log("server")[-6000:])  # noqa: T201 - the logs are the test's artefact
    machines.processes["server"].terminate()
    machines.processes["server"].wait(timeout=15)


def test_five_kills_in_five_stages_cost_no_round(machines: Machines, tiny_model: Path) -> None:
    faulty_run(machines, tiny_model, list(QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("role", [*ROLES, "serverapp+worker:north"])
def test_a_kill_of_each_process_in_each_stage_costs_no_round(machines: Machines, tiny_model: Path, role: str) -> None:
    faulty_run(machines, tiny_model, [(role, stage) for stage in STAGES])


@pytest.mark.slow
def test_a_network_that_is_cut_and_restored_costs_no_round(machines: Machines, tiny_model: Path) -> None:
    cable = Cable(machines.gateway)
    for name in SITES:
        federations.point_at(machines, name, cable.port)
    run = submitted(machines, tiny_model, 4)

    def cut_for_a_while() -> None:
        cable.cut()
        time.sleep(15)
        cable.mend()

    play(machines, run, {2: cut_for_a_while, 3: cut_for_a_while}, {2: "training", 3: "evaluation"})
    assert_finished_and_accounted_for(machines, run, 4)
    cable.close()


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_checkpoint_costs_an_attempt_and_no_round(
    machines: Machines, tiny_model: Path
) -> None:
    run = submitted(machines, tiny_model, 3)

    def fill() -> None:  # the ServerApp can write no file above 4 kB: its checkpoint fails as on a full disk
        server_app = machines.wait_for(lambda: machines.found("serverapp"), "serverapp")
        resource.prlimit(server_app.pid, resource.RLIMIT_FSIZE, (4096, 4096))

    play(machines, run, {2: fill}, {2: "training"})
    assert_finished_and_accounted_for(machines, run, 3)
    with machines.history() as history:
        errors = [item.error for item in history.attempts(run) if item.outcome == "failed"]
    assert any("checkpoint" in (error or "") for error in errors), errors


@pytest.mark.slow
def test_a_site_started_twice_is_refused_in_one_line_and_the_first_goes_on(
    machines: Machines, tiny_model: Path
) -> None:
    run = submitted(machines, tiny_model, 2)
    again = machines.start("north-again", "client", "start", "--config", "site.toml", cwd=machines.site("north"))
    assert again.wait(timeout=60) != 0
    said = machines.log("north-again").strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("Error: ")
    assert_finished_and_accounted_for(machines, run, 2)


@pytest.mark.slow
def test_random_kills_on_both_sides_cost_no_round(machines: Machines, tiny_model: Path) -> None:
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # noqa: T201 - so that a failure can be played again
    import random

    draw = random.Random(seed)  # noqa: S311 - a test's choice
    faults = [(f"{draw.choice(ROLES[:3])}+{draw.choice(ROLES[3:])}", draw.choice(STAGES)) for _ in range(4)]
    print(json.dumps(faults))  # noqa: T201
    faulty_run(machines, tiny_model, faults)
