"""The service when something is away or slow: the database, the network, too many watchers."""

import os
import sys
import threading
import time
from contextlib import contextmanager

import grpc
import psutil
import psycopg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.control import coordinator_pb2 as pb
from server.control import door, exporting, service
from server.control.client import Lost, UnreachableError
from shared.errors import MoonflowerError


def health(coordinator):
    credentials = grpc.ssl_channel_credentials(coordinator.authority.certificate)
    metadata = [("authorization", f"Bearer {coordinator.secrets['vic']}")]
    with grpc.secure_channel(coordinator.address, credentials) as channel:
        request = health_pb2.HealthCheckRequest(service=door.SERVICE)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, metadata=metadata, timeout=30)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


@pytest.fixture
def outage(postgres, postgres_url):
    """Cut a database off for as long as the block lasts."""
    name = postgres_url.partition("?")[0].rpartition("/")[2]

    def execute(*statements):
        with psycopg.connect(postgres, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    @contextmanager
    def away():
        terminate = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"  # noqa: S608
        execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false", terminate)
        try:
            yield
        finally:
            execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")

    return away


def test_a_database_that_is_away_is_told_without_its_address_and_comes_back(make, postgres_url, outage, monkeypatch):
    monkeypatch.setattr(service, "HEALTH", 0.1)
    with make(postgres_url).running() as coordinator, coordinator.client() as client:
        assert health(coordinator) == "SERVING"
        with outage():
            for _ in range(3):
                with pytest.raises(UnreachableError) as caught:
                    client.call("ListRuns", pb.ListRunsRequest())
                assert str(caught.value) == (
                    f"{coordinator.address}: the coordinator's database is away; try again in a while."
                )
            wait(lambda: health(coordinator) == "NOT_SERVING")
        assert client.call("ListRuns", pb.ListRunsRequest()).runs == []
        wait(lambda: health(coordinator) == "SERVING")


def test_a_watch_outlives_its_database(make, postgres_url, outage):
    with make(postgres_url).running() as coordinator, coordinator.client() as client:
        history, run = coordinator.history, coordinator.submit().id
        history.start_attempt(run, engine="flower")
        events = client.watch(run)
        seen = [next(events), next(events)]
        with outage():
            while not isinstance(seen[-1], Lost):
                seen.append(next(events))
        history.add_progress(run, 1, "round", None, "started")
        history.end_attempt(run, 1, "completed")
        history.finish_run(run, "completed")
        seen += events
        told = [each.progress.id for each in seen if not isinstance(each, Lost) and each.HasField("progress")]
        assert told == [each.id for each in history.progress(run)]
        assert seen[-1].run.status == "completed"


def test_a_call_that_takes_too_long_is_given_up(coordinator, monkeypatch):
    monkeypatch.setattr(door, "DEADLINE", 0.2)
    held = threading.Event()
    monkeypatch.setattr(coordinator.history, "runs", lambda **_: held.wait(10))
    with coordinator.client() as client:
        clock = time.monotonic()
        with pytest.raises(UnreachableError, match=r"no answer within 0\.2 s; try again in a while"):
            client.call("ListRuns", pb.ListRunsRequest())
        assert time.monotonic() - clock < 5
        held.set()
        client.call("ListSites", pb.ListSitesRequest())


def test_watchers_leave_room_for_other_calls(coordinator, monkeypatch):
    monkeypatch.setattr(service, "WATCHERS", 2)
    run = coordinator.submit().id
    with coordinator.client("vic") as client:
        watches = [client.stream("WatchRun", pb.WatchRunRequest(run=run)) for _ in range(2)]
        for watch in watches:
            assert next(watch).run.id == run
        with pytest.raises(UnreachableError, match="2 watch already, which is all that may"):
            next(client.stream("WatchRun", pb.WatchRunRequest(run=run)))
        with coordinator.client() as admin:
            assert admin.call("StopRun", pb.StopRunRequest(run=run)).run.status == "stopped"
        for watch in watches:
            assert list(watch)[-1].run.status == "stopped"
        assert list(client.stream("WatchRun", pb.WatchRunRequest(run=run)))[-1].run.status == "stopped"  # room again


def test_watchers_and_exports_that_are_abandoned_leave_nothing(coordinator, monkeypatch, new_round):
    """Their clients vanish in the middle: the places are free again, and the exporting process and its files are gone."""
    monkeypatch.setattr(service, "WATCHERS", 2)
    sleeping = (sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)")
    monkeypatch.setattr(exporting, "COMMAND", sleeping)
    run = coordinator.submit().id
    coordinator.history.start_attempt(run, engine="flower")
    coordinator.history.commit_round(new_round(1, run=run))

    def exports():
        found = psutil.process_iter(["pid", "ppid", "cmdline"])
        mine = [each.info["cmdline"] or [] for each in found if each.info["ppid"] == os.getpid()]
        return [command for command in mine if command[-5:-4] == [run]]

    for _ in range(3):
        with coordinator.client() as client:
            watches = [client.watch(run) for _ in range(2)]
            assert [next(watch).run.id for watch in watches] == [run, run]
            export = client.stream("ExportModel", pb.ExportModelRequest(run=run))
            threading.Thread(target=lambda fetch=export: list_or_error(fetch), daemon=True).start()
            wait(lambda: len(exports()) == 1)
        wait(lambda: not exports())  # the connection is closed
    wait(lambda: not list(coordinator.settings.state.glob(".export-*")))


def list_or_error(stream):
    try:
        return list(stream)
    except (MoonflowerError, ValueError) as error:
        return error


def wait(true):
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)
