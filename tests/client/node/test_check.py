"""`moonflower client check`, beside a real SuperLink: each line ok, or what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client import site as sites
from client.node import check as checks
from client.node.check import Finding
from client.node.coordinator import Knock, knock
from shared import certificates

New = Callable[..., Any]


def look(node: Any, **options: Any) -> dict[str, Finding]:
    """Check without the model, which a test of its own tries."""
    return {finding.name: finding for finding in checks.check(sites.load(node.file), node.file, **options)}


@pytest.mark.slow
def test_a_site_that_is_ready_is_ok_in_every_line_and_its_model_is_tried(new_node: New, tiny_model: Path) -> None:
    node = new_node(privacy={"models": [str(tiny_model)]})
    said = node.moonflower("check")
    assert said.returncode == 0, said.stdout + said.stderr
    lines = {line.split()[1]: line for line in said.stdout.splitlines()}
    assert all(line.startswith("ok ") for line in lines.values())
    assert set(lines) == {"certificate", "clock", "key", "data", "budget", "disk", "device", "model", "probe", "memory"}
    assert "lets this site in" in lines["key"]
    assert "100 records" in lines["data"]
    assert "contributes at most the clipping norm: warm_start by" in lines["probe"]
    assert "64 records of 64 tokens take" in lines["memory"]


def test_a_key_that_is_not_enrolled_is_said_and_the_exit_code_is_one(new_node: New) -> None:
    node = new_node(register=False)
    said = node.moonflower("check")
    assert said.returncode == 1
    assert "wrong  key" in said.stdout
    assert "not enrolled, or was revoked" in said.stdout
    assert said.stderr == ""


def test_a_server_of_another_authority_is_refused(new_node: New, tmp_path: Path) -> None:
    node = new_node(register=False)
    (node.file.parent / "ca.pem").write_bytes(certificates.authority("another", 10).certificate)
    found = look(node)
    assert not found["certificate"].ok
    assert "is refused (unable to get local issuer certificate" in found["certificate"].text or (
        "is refused (self-signed" in found["certificate"].text
    )
    assert "not asked" in found["key"].text


def test_a_coordinator_that_is_not_there_is_said(new_node: New) -> None:
    node = new_node(register=False, coordinator={"address": "127.0.0.1:1"})
    found = look(node)
    assert "127.0.0.1:1 cannot be reached" in found["certificate"].text
    assert found["data"].ok


def test_a_key_that_others_can_read_is_said(new_node: New) -> None:
    node = new_node(register=False)
    (node.file.parent / "site.key").chmod(0o644)
    assert "chmod 600" in look(node)["key"].text


@pytest.mark.parametrize(("skew", "right"), [(0.5, True), (-4.0, True), (-30.0, False), (200.0, True), (400.0, False)])
def test_a_clock_is_right_as_far_as_the_coordinator_takes_what_is_signed_by_it(skew: float, right: bool) -> None:
    said = Knock("refused", True, skew)
    assert said.in_time == right
    assert ("ahead of" in said.clock()) == (skew < 0)


def test_a_knock_changes_nothing_at_the_coordinator(new_node: New) -> None:
    node = new_node()
    assert node.site.coordinator is not None
    said = knock(node.site.coordinator)
    assert (said.trouble, said.reached) == ("", True)
    assert said.skew is not None
    assert abs(said.skew) < 3
    assert node.id not in node.link.nodes(), "the knock has activated the node"


def test_records_that_break_their_declaration_are_said_with_their_row(new_node: New) -> None:
    node = new_node(register=False, dataset={"columns": {"label": "diagnosis"}})
    found = look(node)["data"]
    assert not found.ok
    assert "row 1: column 'diagnosis' is missing" in found.text


def test_the_data_are_read_for_the_task_that_they_are_declared_for(new_node: New) -> None:
    node = new_node(
        register=False, dataset={"task": "seq2seq", "labels": [], "columns": {"source": "text", "target": "label"}}
    )
    found = look(node)["data"]
    assert found.ok, found.text
    assert "records of seq2seq, each with its columns; 100 records are declared" in found.text
    unlabelled = look(new_node(register=False, dataset={"labels": []}))["data"]
    assert not unlabelled.ok
    assert "text-classification needs at least two" in unlabelled.text


def test_a_size_far_from_the_declared_one_is_said(new_node: New) -> None:
    found = look(new_node(register=False, dataset={"records": 200}))["data"]
    assert not found.ok
    assert "records=200" in found.text
    assert "holds 100" in found.text


def test_a_run_that_the_policy_refuses_is_said_before_it_is_joined(
    new_node: New, new_config: New, tmp_path: Path
) -> None:
    import tomli_w

    node = new_node(register=False, privacy={"max_run_epsilon": 2.0})
    values = {key: value for key, value in new_config().as_dict().items() if key not in ("warm_start", "refit")}
    run = tmp_path / "run.toml"
    run.write_text(tomli_w.dumps({key: _without_none(value) for key, value in values.items()}), encoding="utf-8")
    found = look(node, run=run)
    assert not found["run"].ok
    assert "privacy.epsilon=8 is above this site's limit of 2" in found["run"].text


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(held) for key, held in value.items() if held is not None}
    return value


def test_a_device_that_is_not_there_is_said(new_node: New, tiny_model: Path) -> None:
    node = new_node(register=False, privacy={"models": [str(tiny_model)]})
    site = sites.load(node.file, "cuda:7")
    found = {finding.name: finding for finding in checks.check(site, node.file)}
    assert not found["device"].ok
    assert "cuda:7" in found["device"].text
