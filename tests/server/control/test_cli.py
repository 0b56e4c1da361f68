"""`moonflower run` and `moonflower site`, as a person or a script runs them against a coordinator."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from server.control import cli
from server.control.registrar import Seen
from shared import certificates

MOONFLOWER = str(Path(sys.executable).parent / "moonflower")
RUN = """
name = "lungs"
[model]
name = "any"
[task]
labels = ["negative", "positive"]
[training]
rounds = 3
sampling_rate = 0.5
[privacy]
epsilon = inf
"""


@pytest.fixture
def run_toml(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(RUN, encoding="utf-8")
    return str(file)


@pytest.fixture
def said(coordinator):
    """Run a command that works, in this process; give what it printed."""

    def call(group, *arguments, who="ann"):
        done = CliRunner().invoke(
            {"run": cli.run, "site": cli.site}[group], arguments, env=coordinator.environment(who)
        )
        assert (done.exception, done.stderr) == (None, "")
        return done.stdout

    return call


def test_a_run_is_submitted_listed_shown_and_stopped(coordinator, said, run_toml, tmp_path, new_round):
    test = tmp_path / "test.jsonl"
    test.write_text('{"text": "fine", "label": "positive"}\n', encoding="utf-8")
    first, after = said("run", "submit", run_toml, "--test-set", str(test)).splitlines()
    run = first.partition(":")[0]
    assert first == f"{run}: 3 rounds, in the queue."
    assert after == f"Next: moonflower run watch {run}"
    history = coordinator.history
    history.start_attempt(run, engine="flower")
    history.commit_round(new_round(1, run=run, epsilon=float("inf")))

    listed = said("run", "list", who="vic")
    assert run in listed
    assert "running" in listed
    shown = said("run", "show", "last", who="vic")
    assert shown.startswith(f"{run}: running, 1 of 3 rounds, WITHOUT PRIVACY (epsilon inf)\nsubmitted by ann, 20")
    for word in ("scans-2026", "max_epsilon=8 is spent", "accuracy", "Attempt 1 started (flower)."):
        assert word in shown
    values = json.loads(said("run", "show", run, "--format", "json"), parse_constant=pytest.fail)
    assert (values["id"], values["status"], values["rounds_done"]) == (run, "running", 1)
    assert values["config"]["privacy"]["epsilon"] == "inf"
    assert {each["epsilon"] for each in values["spends"]} == {"Infinity"}
    assert [each["outcome"] for each in values["participations"]] == ["ok", "ok", "refused", "ok"]

    assert said("run", "stop", run[:9]) == f"{run}: stopping.\n"
    assert history.queue()[0].stop_requested_at is not None
    asked = json.loads(said("run", "list", "--format", "json"))[0]
    assert asked["stop_requested_at"] == history.run(run).stop_requested_at.isoformat()
    rows = list(csv.DictReader(io.StringIO(said("run", "list", "--format", "csv"))))
    assert [(row["id"], row["submitted_by"]) for row in rows] == [(run, "ann")]


def test_a_mistake_in_the_run_is_one_line_and_code_2(coordinator, tmp_path):
    file = tmp_path / "run.toml"
    for content, message in (
        (RUN.replace("rounds = 3", 'rounds = "x"'), "run.toml: training.rounds='x' must be a whole number."),
        ("= nonsense", "run.toml is not TOML: Invalid statement"),
    ):
        file.write_text(content, encoding="utf-8")
        done = coordinator.call("run", "submit", str(file))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"Error: {message}")
        assert len(done.stderr.splitlines()) == 1
    done = coordinator.call("run", "submit", str(tmp_path / "none.toml"))
    assert (done.returncode, done.stderr) == (
        2,
        f"Error: {tmp_path / 'none.toml'} cannot be read: No such file or directory.\n",
    )


def test_a_site_is_enrolled_listed_renewed_and_revoked(coordinator, said, tmp_path, new_round):
    keys = [certificates.new_node_key()[1] for _ in range(2)]
    for number, key in enumerate(keys):
        (tmp_path / f"{number}.pub").write_text(f"{key} root@st-marys\n", encoding="utf-8")
    assert said("site", "enrol", "st-marys", str(tmp_path / "0.pub")) == "st-marys: enrolled.\n"
    assert coordinator.registrar.changes == 1
    done = coordinator.call("site", "enrol", "st-marys", str(tmp_path / "1.pub"))
    assert (done.returncode, done.stderr) == (
        2,
        "Error: Site 'st-marys' has a key already; renew it, or revoke it first.\n",
    )
    assert said("site", "enrol", "st-marys", str(tmp_path / "1.pub"), "--renew") == "st-marys: enrolled.\n"
    coordinator.history.set_node(keys[1], 2**64 - 1)
    seen = coordinator.history.site_keys()[0].enrolled_at
    coordinator.registrar.known["st-marys"] = Seen(online=True, at=seen)
    (row,) = json.loads(said("site", "list", "--format", "json", who="vic"))
    assert (row["name"], row["state"], row["online"], row["node_id"]) == ("st-marys", "enrolled", True, 2**64 - 1)
    assert (row["public_key"], row["last_seen_at"], row["revoked_at"]) == (keys[1], seen.isoformat(), None)
    asked = coordinator.call("site", "revoke", "st-marys")  # nobody there to say yes
    assert asked.returncode != 0
    assert said("site", "revoke", "st-marys", "--yes", "--format", "json").count('"state": "revoked"') == 1
    assert coordinator.registrar.changes == 3
    assert all(key.revoked_at for key in coordinator.history.site_keys())
    assert "revoked" in said("site", "list")
    done = coordinator.call("site", "enrol", "st-marys", str(tmp_path / "1.pub"))
    assert "which is final; make a new key." in done.stderr


def test_a_profile_names_the_server_its_authority_and_the_token(coordinator, tmp_path):
    kit = tmp_path / "kit"
    kit.mkdir()
    (kit / "ca.pem").write_bytes(coordinator.authority.certificate)
    (kit / "token").write_text(coordinator.secrets["vic"] + "\n", encoding="utf-8")
    (kit / "servers.toml").write_text(
        f'[servers.north]\naddress = "{coordinator.address}"\nca = "ca.pem"\ntoken_file = "token"\n', encoding="utf-8"
    )
    environment = dict.fromkeys(("MOONFLOWER_SERVER", "MOONFLOWER_CA"), "")
    environment |= {"MOONFLOWER_HOME": str(kit)}

    def call(*arguments):
        others = {**coordinator.environment(), **environment}
        del others["MOONFLOWER_TOKEN"]
        return subprocess.run(
            [MOONFLOWER, *arguments], env=others, capture_output=True, text=True, timeout=60, check=False
        )

    assert call("site", "list").stdout == "Sites\nNothing to show.\n"
    assert call("site", "list", "--server", "north").returncode == 0
    wrong = call("site", "list", "--server", "south")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        f"Error: server='south' is not in {kit / 'servers.toml'}; it has north.\n",
    )
    (kit / "token").unlink()
    assert call("site", "list").stderr == (
        f"Error: the token cannot be read: {kit / 'token'}: No such file or directory.\n"
    )


@pytest.mark.parametrize("group", [cli.run, cli.site], ids=["run", "site"])
def test_every_command_is_documented_with_an_example(group):
    for command in [group, *group.commands.values()]:
        assert "Example: moonflower " in (command.help or ""), command.name
        assert all(option.help for option in command.params if isinstance(option, click.Option))


def test_help_needs_no_grpc():
    code = (
        "import sys, server.control.cli; "
        "print(*({'grpc', 'google.protobuf', 'torch', 'flwr', 'sqlalchemy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""
