"""A node's question for messages waits at the door, and what the SuperLink gives out is given to somebody."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from doors import GENEROUS, Door, Site, dial, head, read_all, signed, status, until
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message

from server.gateway.identity import Enrolled
from shared.certificates import Loopback

QUESTION = "/v1/fleet/pull-messages"
FULL = PullMessagesResponse(messages_list=[Message()]).SerializeToString()


class Link:
    """A SuperLink's side of the question: nothing, until there is a message, which is given out once."""

    def __init__(self) -> None:
        self.asked, self.given = 0, 0
        self.message = threading.Event()
        link = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                link.asked += 1
                content = FULL if link.message.is_set() else b""
                link.given += bool(content)
                self.send_response(200)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def enrolled(site: Site) -> Enrolled:
    return Enrolled({site.public: "north"})


@pytest.fixture
def door(link: Link, public_tls: Loopback, enrolled: Enrolled) -> Iterator[Door]:
    limits = GENEROUS.model_copy(update={"wait_seconds": 3.0})
    made = Door(f"127.0.0.1:{link.server.server_port}", None, public_tls, enrolled, limits)
    yield made
    made.close()


def ask(door: Door, site: Site) -> tuple[bytes, float]:
    """Ask for messages; return the answer and the seconds that it took."""
    begin = time.monotonic()
    with dial(door) as connection:
        connection.sendall(
            head("POST", QUESTION, {**signed(site), "content-length": "3", "connection": "close"}) + b"abc"
        )
        return read_all(connection), time.monotonic() - begin


def test_a_question_is_answered_as_soon_as_there_is_a_message(door: Door, link: Link, site: Site) -> None:
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(ask, door, site)
        until(lambda: link.asked >= 3)
        assert not answer.done()
        link.message.set()
        said, seconds = answer.result(timeout=10)
    assert said.endswith(b"\r\n\r\n" + FULL)
    assert link.given == 1
    assert seconds < 3


def test_a_question_that_finds_nothing_ends_after_its_time(door: Door, link: Link, site: Site) -> None:
    said, seconds = ask(door, site)
    assert (status(said), said.partition(b"\r\n\r\n")[2]) == (200, b"")
    assert 2 < seconds < 10
    assert link.asked < 3 / 0.2 + 2


def test_no_message_is_taken_in_the_name_of_a_node_that_has_gone(door: Door, link: Link, site: Site) -> None:
    with dial(door) as connection:
        connection.sendall(head("POST", QUESTION, {**signed(site), "content-length": "3"}) + b"abc")
        until(lambda: link.asked >= 1)
    until(lambda: door.counts()["open"] == 0, 2)  # before its time is over
    link.message.set()
    time.sleep(0.5)
    assert link.given == 0
    assert ask(door, site)[0].endswith(FULL)


def test_a_key_that_is_revoked_while_its_node_waits_is_refused(
    door: Door, link: Link, site: Site, enrolled: Enrolled
) -> None:
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(ask, door, site)
        until(lambda: link.asked >= 1)
        enrolled.replace({})
        said, seconds = answer.result(timeout=10)
    assert status(said) == 401
    assert seconds < 2


def test_a_door_that_stops_lets_nobody_wait(door: Door, link: Link, site: Site) -> None:
    with ThreadPoolExecutor(1) as asking:
        answer = asking.submit(ask, door, site)
        until(lambda: link.asked >= 1)
        begin = time.monotonic()
        door.stop(2.0)
        assert time.monotonic() - begin < 1.5
        assert status(answer.result(timeout=10)[0]) == 200
