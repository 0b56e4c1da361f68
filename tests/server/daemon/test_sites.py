"""Whose key opens the door: the history's word, whatever file is put back and whoever changed it."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from server.daemon import sites
from server.daemon.flower import Node
from server.daemon.patience import Patience
from server.daemon.sites import Sites
from server.gateway.identity import Enrolled
from server.history.store import History
from server.provision.enrolment import Enrolment, SiteKey
from shared.certificates import new_node_key
from shared.errors import ConfigError


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    with History.open(f"sqlite:///{tmp_path / 'history.db'}") as it:
        yield it


def keeper(tmp_path: Path, history: History) -> Sites:
    superlink = cast(Any, SimpleNamespace(up=asyncio.Event()))  # down: it learns later
    return Sites(tmp_path / "enrolment.json", history, Patience(), superlink, Enrolled())


def live(history: History) -> set[str]:
    return {key.public_key for key in history.site_keys() if key.revoked_at is None}


def test_a_key_that_was_revoked_before_the_coordinator_ever_saw_it_never_comes_in(
    tmp_path: Path, history: History
) -> None:
    (_, stolen), (_, fresh) = new_node_key(), new_node_key()
    older = Enrolment(sites=(SiteKey(name="st-marys", public_key=stolen),))
    file = tmp_path / "enrolment.json"

    async def play() -> None:
        kept = keeper(tmp_path, history)
        file.write_bytes(older.renew("st-marys", fresh).content())
        await kept.take_over()
        assert live(history) == {fresh}
        file.write_bytes(older.content())  # put back by mistake, or by whoever holds the stolen key
        await kept.take_over()
        assert live(history) == {fresh}

    asyncio.run(play())
    with pytest.raises(ConfigError, match="which is final"):
        history.enrol("st-marys", stolen, renew=True)


def test_a_key_that_anybody_revokes_in_the_history_is_out_at_the_door_soon(
    tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "LOOK", 0.05)
    (tmp_path / "enrolment.json").write_bytes(Enrolment().content())
    history.enrol("st-marys", new_node_key()[1])

    async def play() -> None:
        kept = keeper(tmp_path, history)
        await kept.take_over()
        door = cast(Any, kept)._enrolled
        assert len(door) == 1
        following = asyncio.create_task(kept.follow())
        history.revoke("st-marys")  # as RevokeSite does, whose caller is gone before the door is told
        async with asyncio.timeout(5):
            while len(door):
                await asyncio.sleep(0.02)
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following

    asyncio.run(play())


def test_a_node_that_somebody_on_this_machine_unregisters_is_registered_again(
    tmp_path: Path, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sites, "LOOK", 0.02)
    (tmp_path / "enrolment.json").write_bytes(Enrolment().content())
    key = new_node_key()[1]
    history.enrol("st-marys", key)
    nodes: dict[str, int] = {}

    class Flower:  # what a SuperLink keeps
        def nodes(self) -> list[Node]:
            return [Node(id, key, online=True, heard_at=None) for key, id in nodes.items()]

        def register(self, key: str, _site: str) -> int:
            return nodes.setdefault(key, 7)

        def unregister(self, node: int) -> None:
            for key in [key for key, id in nodes.items() if id == node]:
                del nodes[key]

    async def play() -> None:
        up = asyncio.Event()
        up.set()
        superlink = cast(Any, SimpleNamespace(up=up, flower=Flower()))
        kept = Sites(tmp_path / "enrolment.json", history, Patience(), superlink, Enrolled())
        await kept.take_over()
        assert nodes == {key: 7}
        following = asyncio.create_task(kept.follow())
        nodes.clear()
        nodes[new_node_key()[1]] = 8  # and one of his own is entered
        async with asyncio.timeout(10):
            while nodes != {key: 7}:
                await asyncio.sleep(0.02)
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following

    asyncio.run(play())
