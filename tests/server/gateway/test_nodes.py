"""Real SuperNodes at the door of a real SuperLink: they come in, outlast trouble, and leave when their key is revoked."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from doors import GENEROUS, Door, Node, Site, SuperLink, dial, new_site, opened, until

from shared.certificates import Loopback

Start = Callable[[Site, Door], Node]


def test_an_enrolled_node_comes_online_and_ends_when_it_is_revoked(
    superlink: SuperLink, public_tls: Loopback, start_node: Start, tmp_path: Path
) -> None:
    site = new_site(tmp_path, "north")
    node_id = superlink.register(site)
    with opened(superlink, public_tls, {site.public: "north"}) as door:
        node = start_node(site, door)
        until(lambda: f"SuperNode ID: {node_id}" in node.text())
        assert node_id in superlink.online()

        assert door.enrolled is not None
        door.enrolled.replace({})
        begin = time.monotonic()
        assert node.wait() == 0  # what flower-supernode makes of a 401
        assert time.monotonic() - begin < 15

        again = start_node(site, door)
        assert again.wait() == 1
        assert "[code: 9401] this node's key is not enrolled here, or was revoked" in again.text()
        assert door.counts()["refused: unknown key"] >= 2


@pytest.mark.slow
def test_a_node_outlasts_a_superlink_that_is_down(
    superlink: SuperLink, public_tls: Loopback, start_node: Start, tmp_path: Path
) -> None:
    site = new_site(tmp_path, "patient")
    node_id = superlink.register(site)
    with opened(superlink, public_tls, {site.public: "patient"}) as door:
        node = start_node(site, door)
        until(lambda: f"SuperNode ID: {node_id}" in node.text())
        superlink.stop()
        until(lambda: door.counts().get("refused: superlink", 0) > 4, 60)
        assert node.child.poll() is None
        superlink.start()
        passed = door.counts()["passed"]
        until(lambda: door.counts()["passed"] > passed + 1, 60)
        assert node.child.poll() is None
        assert node_id in superlink.online()


def test_a_node_works_on_behind_200_slow_strangers(
    superlink: SuperLink, public_tls: Loopback, start_node: Start, tmp_path: Path
) -> None:
    site = new_site(tmp_path, "south")
    node_id = superlink.register(site)
    limits = GENEROUS.model_copy(update={"max_connections": 120, "head_seconds": 600.0})
    with opened(superlink, public_tls, {site.public: "south"}, limits) as door, ExitStack() as stack:
        strangers = [stack.enter_context(dial(door, f"127.0.0.{2 + n % 4}")) for n in range(100)]
        node = start_node(site, door)
        until(lambda: f"SuperNode ID: {node_id}" in node.text())
        strangers += [stack.enter_context(dial(door, f"127.0.0.{2 + n % 4}")) for n in range(100)]
        for stranger in strangers[100:]:
            stranger.sendall(b"POST /v1/fl")
        passed = door.counts()["passed"]
        until(lambda: door.counts()["passed"] > passed + 1)
        assert "retrying" not in node.text()  # its connections were never displaced
        counts = door.counts()
        assert counts["open"] <= 120
        assert counts["displaced"] >= 80
        assert node_id in superlink.online()


def test_a_node_without_enrolment_never_reaches_the_superlink(
    superlink: SuperLink, public_tls: Loopback, start_node: Start, tmp_path: Path
) -> None:
    site = new_site(tmp_path, "stranger")
    superlink.register(site)  # even where the SuperLink would take it
    with opened(superlink, public_tls, {}) as door:
        assert start_node(site, door).wait() == 1
        assert door.counts().get("passed", 0) == 0
