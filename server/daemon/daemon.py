"""The coordinator's daemon: one process that holds its state's lock and keeps everything else running."""

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import Coroutine
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from server.control import service as control
from server.daemon.patience import Patience
from server.daemon.queue import Queue
from server.daemon.settings import Settings
from server.daemon.sites import Sites
from server.daemon.superlink import SuperLink
from server.gateway.door import Gateway
from server.gateway.identity import Enrolled
from server.history.store import History
from shared.errors import ConfigError
from shared.locks import hold, holder
from shared.processes import family, kill

log = logging.getLogger("moonflower.daemon")
STATUS = "status.json"
DRAIN = 2.0  # seconds that requests under way get at the end
MOST_SECONDS = 9.5  # to the end after a signal, whatever hangs
STATUS_EVERY = 1.0  # seconds


def play(settings: Settings, *, insecure: bool = False) -> None:
    """Run the daemon until SIGTERM or SIGINT.

    Raises
    ------
    ConfigError
        Where another daemon holds the state, or a file, a port or a certificate is not as it should be.
    DatabaseError
        Where the history cannot be opened. Later, the daemon waits for it.
    """
    try:
        settings.runs.mkdir(parents=True, exist_ok=True)
        settings.state.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"state={str(settings.state)!r} cannot be used: {error.strerror}.") from None
    with hold(settings.lock, f"the state folder {settings.state}"):
        leftovers = family(_mark(settings))
        if leftovers:
            names = ", ".join(f"{process.pid}" for process in leftovers)
            log.warning("ending what an earlier daemon left behind: processes %s", names)
            kill(leftovers)
        with History.open(settings.history) as history:
            asyncio.run(_serve(settings, history, insecure=insecure))


def status(settings: Settings) -> dict[str, Any]:
    """Say what the daemon last wrote of itself; its `running` is whether it holds the lock now."""
    pid = holder(settings.lock)
    values: dict[str, Any] = {}
    with suppress(FileNotFoundError):
        values = json.loads((settings.state / STATUS).read_text(encoding="utf-8"))
    return {"running": pid is not None and pid == values.get("pid"), **values}


async def _serve(settings: Settings, history: History, *, insecure: bool) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _end, ending)
    mark, patiently = _mark(settings), Patience()
    enrolled = None if insecure else Enrolled()
    superlink = SuperLink(settings.state, insecure=insecure, mark=mark)
    sites = Sites(settings.enrolment, history, patiently, superlink, enrolled)
    queue = Queue(settings, history, patiently, superlink, mark)
    gateway = Gateway(
        settings.gateway.host,
        settings.gateway.port,
        None if insecure else settings.tls.certificate,
        None if insecure else settings.tls.key,
        superlink.address,
        superlink.ca,
        settings.gateway,
        enrolled,
        settings.state,
    )

    async def ready() -> None:
        for run in await asyncio.to_thread(superlink.flower.unfinished):
            await asyncio.to_thread(superlink.flower.stop, run)  # of a ServerApp that is gone
        await sites.register()

    await sites.take_over()
    await gateway.start()
    service = await control.start(settings, history, sites, insecure=insecure)
    log.info(
        "coordinator %s: sites at %s:%d, control at %s:%d, state in %s",
        *(settings.name, settings.gateway.host, gateway.port, settings.control.host, service.port, settings.state),
    )

    def now() -> dict[str, Any]:
        return {
            "name": settings.name,
            "pid": os.getpid(),
            "insecure": insecure,
            "gateway": {"host": settings.gateway.host, "port": gateway.port, **gateway.counts()},
            "control": {"host": settings.control.host, "port": service.port},
            "superlink": {
                "address": superlink.address,
                "pid": superlink.pid,
                "up": superlink.up.is_set(),
                "ended": superlink.ends,
            },
            "database": "away" if patiently.gone else "ok",
            **queue.status(),
        }

    try:
        await _until(
            ending,
            superlink.supervise(ready),
            superlink.listen(),
            sites.follow(),
            queue.work(),
            _report(settings.state / STATUS, now),
        )
    finally:
        log.info("ending: no new requests; then the ServerApps and the SuperLink")
        await asyncio.gather(gateway.stop(DRAIN), service.stop(DRAIN), _quickly(queue.close()))
        await superlink.stop()
        log.info("ended")


async def _until(ending: asyncio.Event, *forever: Coroutine[Any, Any, None]) -> None:
    """Work until `ending` is set, or one of the works fails."""
    waiting = asyncio.create_task(ending.wait())
    tasks = [asyncio.create_task(each) for each in forever]
    try:
        done, _ = await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            await task
    finally:
        for task in (waiting, *tasks):
            task.cancel()
        await asyncio.gather(waiting, *tasks, return_exceptions=True)


async def _report(file: Path, now: Any) -> None:
    """Write what runs into the status file whenever it has changed."""
    written = None
    while True:
        values = now()
        if values != written:
            fresh = file.with_suffix(".new")
            try:
                fresh.write_text(json.dumps({"at": datetime.now(UTC).isoformat(), **values}, indent=2) + "\n", "utf-8")
                fresh.replace(file)
                written = values
            except OSError as error:  # such as a full disk; the daemon does not need it
                log.warning("%s cannot be written: %s", file, error.strerror)
        await asyncio.sleep(STATUS_EVERY)


def _end(ending: asyncio.Event) -> None:
    """Begin to end. What hangs is left behind: the children die with this process."""
    if not ending.is_set():
        watchdog = threading.Timer(MOST_SECONDS, os._exit, [1])
        watchdog.daemon = True
        watchdog.start()
    ending.set()


async def _quickly(ending: Coroutine[Any, Any, None]) -> None:
    try:
        await asyncio.wait_for(ending, 2 * DRAIN)
    except TimeoutError:
        log.warning("the history was not told of the interrupted attempts; the next ones will")


def _mark(settings: Settings) -> str:
    return f"moonflower server {settings.state}"
