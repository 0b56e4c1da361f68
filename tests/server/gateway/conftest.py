"""A SuperLink for all tests of the door, sites, and SuperNodes that end with their test."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from doors import Door, Node, Site, SuperLink, free_port, new_site

from shared.certificates import Loopback, loopback


@pytest.fixture(scope="session")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    """Give a running SuperLink. Who stops it starts it again."""
    folder = tmp_path_factory.mktemp("superlink")
    link = SuperLink(folder, loopback(folder / "tls"), free_port())
    link.start()
    yield link
    link.stop()


@pytest.fixture(scope="session")
def public_tls(tmp_path_factory: pytest.TempPathFactory) -> Loopback:
    """Give what the door shows to sites: another authority than the SuperLink's own."""
    return loopback(tmp_path_factory.mktemp("public"))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Give a site with a key, enrolled nowhere."""
    return new_site(tmp_path, "north")


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[Callable[[Site, Door], Node]]:
    """Start SuperNodes that end with the test."""
    nodes: list[Node] = []

    def start(site: Site, door: Door) -> Node:
        assert door.tls is not None
        nodes.append(Node(site, door.address, door.tls.ca, tmp_path))
        return nodes[-1]

    yield start
    for node in nodes:
        node.stop()
