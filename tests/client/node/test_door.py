"""A site's knock at the coordinator's real gateway."""

import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from doors import GENEROUS, Door

from client.node import coordinator
from client.node.coordinator import UNKNOWN_KEY, knock
from client.site import Coordinator
from server.gateway.identity import Enrolled
from shared import certificates

New = Callable[..., Any]


@pytest.fixture
def door(link: Any, tmp_path: Path) -> Iterator[Door]:
    tls = certificates.loopback(tmp_path / "public")
    made = Door(link.address, link.tls.ca, tls, Enrolled({}), GENEROUS)
    yield made
    made.close()


@pytest.fixture
def site(link: Any, door: Door, tmp_path: Path) -> tuple[Coordinator, str]:
    private, public = certificates.new_node_key()
    certificates.write_key(tmp_path / "site.key", private)
    link.register(public, f"door-{next(link.numbers)}")
    assert door.tls is not None
    own = Coordinator(name="north", address=door.address, ca=door.tls.ca, key=tmp_path / "site.key", state=tmp_path)
    return own, public


def test_a_key_that_the_gateway_does_not_know_is_refused_and_enters_once_it_is_enrolled(
    door: Door, site: tuple[Coordinator, str]
) -> None:
    own, public = site
    said = knock(own)
    assert said.trouble == UNKNOWN_KEY
    assert said.skew is not None, "who is refused cannot compare clocks"
    assert door.enrolled is not None
    door.enrolled.replace({public: "north"})
    said = knock(own)
    assert (said.trouble, said.reached) == ("", True)
    assert said.skew is not None
    door.enrolled.replace({})
    assert knock(own).trouble == UNKNOWN_KEY


def test_a_clock_that_the_gateway_refuses_is_told_from_a_key(
    door: Door, site: tuple[Coordinator, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(minutes=10)

    own, public = site
    assert door.enrolled is not None
    door.enrolled.replace({public: "north"})
    monkeypatch.setattr(coordinator, "datetime", Ahead)
    said = knock(own)
    assert re.search(r"clock is (599|600|601) s ahead of", said.trouble), said
    assert "set it (NTP)" in said.trouble
