"""Who may come in: the history's keys, brought to the gateway and to the SuperLink.

The history is the truth. enrolment.json, which `moonflower provision` writes, is taken into it at the start and
whenever the file changes. Revocation is final: a key that the history calls revoked never comes back.
"""

import asyncio
import logging
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from server.control.registrar import Seen
from server.daemon.flower import SuperLinkError
from server.daemon.patience import Patience
from server.daemon.superlink import SuperLink
from server.gateway.identity import Enrolled
from server.history.store import History
from server.provision import enrolment
from shared.errors import ConfigError

log = logging.getLogger("moonflower.daemon")
LOOK = 2.0  # seconds between looks at enrolment.json
LOOKS = 15  # until the SuperLink's nodes are compared, too: whoever is on this machine may have changed them


class Sites:
    """The `Registrar` of the control service.

    Parameters
    ----------
    file : Path
        enrolment.json.
    history, patiently
        The open history, and how it is called.
    superlink : SuperLink
        Where nodes are registered; one that is down is brought in step when it is up again.
    enrolled : Enrolled | None
        The gateway's keys; None where nodes have none (`--insecure`).
    """

    def __init__(
        self, file: Path, history: History, patiently: Patience, superlink: SuperLink, enrolled: Enrolled | None
    ) -> None:
        self._file, self._history, self._patiently = file, history, patiently
        self._superlink, self._enrolled = superlink, enrolled
        self._turn = asyncio.Lock()
        self._stamp: tuple[int, int] | None = None  # of the file as it was taken over
        self._admitted: dict[str, str] = {}  # keys, and their sites, that the gateway lets in
        self._behind = False  # whether the SuperLink does not know yet what the history says

    async def changed(self) -> None:
        """Take the history's keys over: a revoked one is shut out from the next request on, a new one let in."""
        await self._admit()
        if self._superlink.up.is_set():
            try:
                await self.register()
            except SuperLinkError as error:
                log.warning("sites are not registered with the SuperLink yet: %s", error)
                self._behind = True

    async def register(self) -> None:
        """Register the living keys with the SuperLink, and unregister all others.

        Raises
        ------
        SuperLinkError
            Where it does not answer.
        """
        if self._enrolled is None:
            return
        async with self._turn:
            keys = await self._patiently(self._history.site_keys)
            live = {key.public_key: key for key in keys if key.revoked_at is None}
            nodes = {node.key: node.id for node in await asyncio.to_thread(self._superlink.flower.nodes)}
            for line in nodes.keys() - live.keys():
                await asyncio.to_thread(self._superlink.flower.unregister, nodes[line])
                log.info("node %d is unregistered: its key is not enrolled any more", nodes[line])
            for line, key in live.items():
                if line not in nodes:
                    nodes[line] = await asyncio.to_thread(self._superlink.flower.register, line, key.site)
                    log.info("site %s is registered as node %d", key.site, nodes[line])
                if key.node_id != nodes[line]:
                    await self._patiently(self._history.set_node, line, nodes[line])
            self._behind = False

    async def seen(self) -> Mapping[str, Seen]:
        """Say which sites' nodes are online, by the site's name; nothing while the SuperLink is down."""
        try:
            nodes = await asyncio.to_thread(self._superlink.flower.nodes)
        except SuperLinkError:
            return {}
        names = {key.public_key: key.site for key in await self._patiently(self._history.site_keys)}
        return {names[node.key]: Seen(node.online, node.heard_at) for node in nodes if node.key in names}

    async def take_over(self) -> None:
        """Take enrolment.json into the history, and the history's keys to the gateway.

        Raises
        ------
        ConfigError
            Where the file cannot be read; nothing has changed.
        """
        stamp = self._stamp_now()
        if self._enrolled is not None:
            listed = enrolment.read(self._file)
            known = {key.public_key: key for key in await self._patiently(self._history.site_keys)}
            for key in listed.sites:
                its = known.get(key.public_key)
                if key.revoked and (
                    its is None or its.revoked_at is None
                ):  # also one that was revoked before it was used
                    await self._patiently(self._history.forbid, key.name, key.public_key)
                    log.info("a key of site %s is revoked", key.name)
                elif not key.revoked and its is None:
                    await self._patiently(self._history.enrol, key.name, key.public_key, renew=True)
                    log.info("site %s is enrolled", key.name)
        self._stamp = stamp
        await self.changed()

    async def follow(self) -> None:
        """Take enrolment.json over whenever it changes, for ever; one that cannot be read changes nothing.

        The history's keys too, whoever changed them: a call that revokes a key may be broken off before it says so here.
        """
        for look in count(1):
            await asyncio.sleep(LOOK)
            stamp = self._stamp_now()
            if stamp == self._stamp:
                if self._behind or not look % LOOKS or await self._live() != self._admitted:
                    await self.changed()
                continue
            try:
                await self.take_over()
            except ConfigError as error:
                self._stamp = stamp
                log.error("%s The sites stay as they were.", error)

    async def _admit(self) -> None:
        if self._enrolled is None:
            return
        live = await self._live()
        self._enrolled.replace(live)
        self._admitted = live

    async def _live(self) -> dict[str, str]:
        """Return the site of each key that the history calls alive."""
        if self._enrolled is None:
            return {}
        keys = await self._patiently(self._history.site_keys)
        return {key.public_key: key.site for key in keys if key.revoked_at is None}

    def _stamp_now(self) -> tuple[int, int] | None:
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino
