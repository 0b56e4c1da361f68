"""The control service: what the federation's own people ask of the coordinator, over gRPC.

Who may call, and how errors are told, is `door`. The history is asked in threads, so that the daemon's loop
goes on; what a daemon alone can do is behind `registrar`.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from server.control import coordinator_pb2 as pb
from server.control import coordinator_pb2_grpc, exporting, submission, wire
from server.control.door import CALLER, SERVICE, Away, Door
from server.control.registrar import Registrar
from server.control.tokens import Tokens
from server.daemon.settings import Settings
from server.history.records import Run
from server.history.store import History
from shared.certificates import node_key_line
from shared.errors import ConfigError, DatabaseError, NotFoundError

log = logging.getLogger("moonflower.control")

LARGEST_REQUEST = 64 << 20  # bytes: a public test set
CALLS = 64  # at once, over all clients
WATCHERS = 48  # of them: there is always room to stop a run
THREADS = 8  # that ask the database
POLL = 0.5  # seconds between a watcher's looks at the history
PAGE = 500  # progress rows that a watcher is told at once
EVENTS = 50  # of a run, the newest, that GetRun gives
HEALTH = 5.0  # seconds between looks at the database
OPTIONS = [
    ("grpc.max_receive_message_length", LARGEST_REQUEST + (1 << 20)),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.max_concurrent_streams", 16),  # of one connection
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.max_connection_idle_ms", 300_000),
    ("grpc.keepalive_time_ms", 60_000),  # a watcher that is gone without a word is found out
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.so_reuseport", 0),  # a port that is taken is an error, not shared
]
FINISHED = {"completed", "failed", "stopped"}
T = TypeVar("T")


class Coordinator(coordinator_pb2_grpc.CoordinatorServicer):
    """The methods of coordinator.proto; its comments say what each is for."""

    def __init__(self, settings: Settings, history: History, registrar: Registrar) -> None:
        self.settings, self.history, self.registrar = settings, history, registrar
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="control")
        self.closing = asyncio.Event()
        self._exports = asyncio.Semaphore(1)
        self._watchers = 0

    async def in_thread(self, work: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Ask the history without holding the loop up."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, lambda: work(*arguments, **named))

    async def SubmitRun(self, request: pb.SubmitRunRequest, _context: object) -> pb.SubmitRunResponse:
        """Check a run, lay it out, and put it in the queue."""
        run = await self.in_thread(
            submission.submit,
            self.settings,
            self.history,
            request_id=request.request_id,
            config_toml=request.config_toml,
            test_set=request.test_set if request.HasField("test_set") else None,
            by=CALLER.get(),
        )
        log.info("run %s submitted by %s", run.id, CALLER.get())
        return pb.SubmitRunResponse(run=wire.message(pb.Run, run))

    async def ListRuns(self, request: pb.ListRunsRequest, _context: object) -> pb.ListRunsResponse:
        """List the runs, newest first."""
        if request.limit < 0:
            raise ConfigError(f"limit={request.limit} must be at least 0.")
        runs = await self.in_thread(self.history.runs, limit=request.limit or None)
        return pb.ListRunsResponse(runs=[wire.message(pb.Run, run) for run in runs])

    async def GetRun(self, request: pb.GetRunRequest, _context: object) -> pb.GetRunResponse:
        """Give a run with its attempts, its last round and its newest events."""
        return await self.in_thread(self._get, request.run)

    def _get(self, asked: str) -> pb.GetRunResponse:
        run = self._run(asked)
        last = self.history.last_round(run.id)
        return pb.GetRunResponse(
            run=wire.message(pb.Run, run),
            config_json=json.dumps(run.config),
            attempts=[wire.message(pb.Attempt, value) for value in self.history.attempts(run.id)],
            metrics=[wire.message(pb.Metric, value) for value in (last.metrics if last else ())],
            participations=[wire.message(pb.Participation, value) for value in (last.participations if last else ())],
            spends=[wire.message(pb.Spend, value) for value in (last.spends if last else ())],
            events=[wire.message(pb.Event, value) for value in self.history.events(run.id, limit=EVENTS)],
        )

    async def WatchRun(self, request: pb.WatchRunRequest, _context: object) -> AsyncIterator[pb.WatchRunResponse]:
        """Tell a run's progress after a cursor, as it happens, until the run has finished."""
        run = (await self.in_thread(self._run, request.run)).id
        if self._watchers >= WATCHERS:
            raise Away(f"{WATCHERS} watch already, which is all that may; try again in a while.")
        self._watchers += 1
        try:
            async with aclosing(self._watch(run, request.after)) as events:
                async for told in events:
                    yield told
        finally:
            self._watchers -= 1

    async def _watch(self, run: str, after: int) -> AsyncGenerator[pb.WatchRunResponse]:
        told: Run | None = None
        while True:
            now = await self.in_thread(self.history.run, run)  # before its progress: what led to it is told first
            page = await self.in_thread(self.history.progress, run, after=after, limit=PAGE)
            if told is None:
                yield pb.WatchRunResponse(run=wire.message(pb.Run, now))
                told = now
            for value in page:
                yield pb.WatchRunResponse(progress=wire.message(pb.Progress, value))
                after = value.id
            if len(page) == PAGE:
                continue
            finished = now.status in FINISHED
            if now != told or finished:
                yield pb.WatchRunResponse(run=wire.message(pb.Run, now))
                told = now
            if finished:
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self.closing.wait(), POLL)
                raise Away("the coordinator is stopping; the run goes on when it is back.")

    async def StopRun(self, request: pb.StopRunRequest, _context: object) -> pb.StopRunResponse:
        """Ask for a run to be stopped."""
        run = await self.in_thread(self._run, request.run)
        stopped = await self.in_thread(self.history.request_stop, run.id, by=CALLER.get())
        log.info("run %s: a stop was requested by %s", run.id, CALLER.get())
        return pb.StopRunResponse(run=wire.message(pb.Run, stopped))

    async def ListSites(self, _request: pb.ListSitesRequest, _context: object) -> pb.ListSitesResponse:
        """List the sites that were ever enrolled."""
        keys, seen = await self.in_thread(self.history.site_keys), await self.registrar.seen()
        return pb.ListSitesResponse(sites=wire.sites(keys, seen))

    async def EnrolSite(self, request: pb.EnrolSiteRequest, _context: object) -> pb.EnrolSiteResponse:
        """Enrol a site's key, or put it in place of the site's older one."""
        key = node_key_line(request.public_key)
        await self.in_thread(self.history.enrol, request.site, key, renew=request.renew)
        log.info("site %s %s by %s", request.site, "renewed" if request.renew else "enrolled", CALLER.get())
        return pb.EnrolSiteResponse(site=await self._changed(request.site))

    async def RevokeSite(self, request: pb.RevokeSiteRequest, _context: object) -> pb.RevokeSiteResponse:
        """Revoke a site's key for good."""
        await self.in_thread(self.history.revoke, request.site)
        log.info("site %s revoked by %s", request.site, CALLER.get())
        return pb.RevokeSiteResponse(site=await self._changed(request.site))

    async def _changed(self, site: str) -> pb.Site:
        await self.registrar.changed()
        keys, seen = await self.in_thread(self.history.site_keys), await self.registrar.seen()
        return wire.site(site, (key for key in keys if key.site == site), seen.get(site))

    async def ExportModel(
        self, request: pb.ExportModelRequest, _context: object
    ) -> AsyncIterator[pb.ExportModelResponse]:
        """Send a run's model as a tar of a Hugging Face folder, one export at a time."""
        run = await self.in_thread(self._run, request.run)
        if not run.rounds_done:
            raise NotFoundError(f"Run '{run.id}' has committed no round yet; there is nothing to export.")
        form = request.form or "merged"
        folder = self.settings.run(run.id)
        async with self._exports:
            log.info("run %s: %s exported by %s", run.id, form, CALLER.get())
            asked = exporting.Asked(run.id, folder, form, request.round)
            tar = exporting.tar(asked, database=self.history.url, scratch=self.settings.state)
            async with aclosing(tar) as parts:
                async for part in parts:
                    if isinstance(part, bytes):
                        yield pb.ExportModelResponse(data=part)
                    else:
                        yield pb.ExportModelResponse(sha256=part)

    def _run(self, asked: str) -> Run:
        if asked != "last":
            try:
                return self.history.run(asked)
            except NotFoundError as error:  # which names the command of the coordinator's own host
                raise NotFoundError(str(error).replace("moonflower history runs", "moonflower run list")) from None
        newest = self.history.runs(limit=1)
        if not newest:
            raise NotFoundError("There is no run yet; `moonflower run submit` makes one.")
        return newest[0]


class Service:
    """The service as it runs, in the loop that started it."""

    def __init__(self, server: grpc.aio.Server, port: int, coordinator: Coordinator, state: health.aio.HealthServicer):
        self.port = port
        self._server, self._coordinator, self._state = server, coordinator, state
        self._looking = asyncio.create_task(self._look())

    async def stop(self, grace: float) -> None:
        """Take no more calls, end the watchers' streams, and wait so many seconds for the rest."""
        self._looking.cancel()
        self._coordinator.closing.set()
        await self._state.enter_graceful_shutdown()
        await self._server.stop(grace)
        self._coordinator.pool.shutdown(wait=False, cancel_futures=True)

    async def _look(self) -> None:
        """Keep grpc.health.v1 true: serving while the database answers."""
        status = health_pb2.HealthCheckResponse
        while True:
            try:
                await self._coordinator.in_thread(self._coordinator.history.queue)
                now = status.SERVING
            except DatabaseError:
                now = status.NOT_SERVING
            for name in ("", SERVICE):
                await self._state.set(name, now)
            await asyncio.sleep(HEALTH)


async def start(settings: Settings, history: History, registrar: Registrar, *, insecure: bool = False) -> Service:
    """Serve on settings.control, with TLS and tokens, in the running loop.

    Parameters
    ----------
    settings
        The daemon's; its `state` exists.
    history
        Open; the caller closes it after `Service.stop`.
    registrar
        The daemon.
    insecure
        Plaintext and no tokens: every caller is an admin. The caller has seen to it that the host is loopback.

    Raises
    ------
    ConfigError
        Where certificate, key or tokens cannot be read, or the port cannot be had.
    """
    submission.tidy(settings.runs)
    exporting.tidy(settings.state)
    credentials = None if insecure else _credentials(settings)
    door = Door(None if insecure else Tokens.load(settings.tokens))
    server = grpc.aio.server(interceptors=[door], options=OPTIONS, maximum_concurrent_rpcs=CALLS)
    coordinator, state = Coordinator(settings, history, registrar), health.aio.HealthServicer()
    coordinator_pb2_grpc.add_CoordinatorServicer_to_server(coordinator, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(state, server)
    host, port = settings.control.host, settings.control.port
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, credentials)
    except RuntimeError:
        raise ConfigError(
            f"control.host={host!r}, control.port={port}: cannot listen there; is the port taken, or the host not this machine's?"
        ) from None
    await state.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)  # the history is open
    await server.start()
    return Service(server, bound, coordinator, state)


def _credentials(settings: Settings) -> grpc.ServerCredentials:
    key, certificate = (_read(path) for path in (settings.tls.key, settings.tls.certificate))
    return grpc.ssl_server_credentials([(key, certificate)])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; `moonflower provision` makes it.") from None
