"""A coordinator as `moonflower provision` makes it, and its daemon as a process of its own."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Coordinator, free_port

from server.provision import provisioning

SITE = """
[[sites]]
name = "{name}"
dataset = {{ id = "{name}.notes", path = "records.jsonl", records = 60, labels = ["negative", "positive"] }}
privacy = {{ max_epsilon = 100.0, models = ["*"] }}
"""


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[Coordinator]:
    """Give a coordinator of two sites, whose daemon is not started yet."""
    ports = f"gateway_port = {free_port()}\ncontrol_port = {free_port()}\n"
    sites = "".join(SITE.format(name=name) for name in ("st-marys", "st-johns"))
    users = '[[users]]\nname = "alice"\nrole = "admin"\ndays = 30\n'
    text = f'name = "north"\n[coordinator]\nhosts = ["127.0.0.1"]\n{ports}{sites}{users}'
    (tmp_path / "federation.toml").write_text(text, encoding="utf-8")
    provisioning.make(tmp_path / "federation.toml", tmp_path / "kits")
    made = Coordinator(tmp_path / "kits" / "coordinator")
    yield made
    made.end()


@pytest.fixture
def daemon(coordinator: Coordinator) -> subprocess.Popen[bytes]:
    """Give the coordinator's daemon, running."""
    return coordinator.start()
