"""What the network and kills do to a node: it comes back by itself, and what it has released it sends again."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from client.site import open_ledger
from shared import models
from shared.messages import JoinRequest, TrainRequest
from shared.run_config import RunConfig

New = Callable[..., Any]
FORGOTTEN = 150.0  # seconds in which the SuperLink forgets a connection that has died, on a busy machine
SIGNED_OFF = 30.0  # seconds to the next connection where the last one was signed off: a start of flower-supernode


class Cable:
    """A port of the loopback that leads to another, until it is cut, or carries garbage."""

    def __init__(self, port: int) -> None:
        self.port_of_link, self.port = port, 0
        self.ends: list[socket.socket] = []
        self.become("whole")

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                if self.state == "whole":
                    far = socket.create_connection(("127.0.0.1", self.port_of_link))
                    self.ends += [near, far]
                    for one, other in ((near, far), (far, near)):
                        threading.Thread(target=self._carry, args=(one, other), daemon=True).start()
                    continue
                near.sendall(b"HTTP/1.0 400 not TLS\r\n\r\n" * 20)
                near.close()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def become(self, state: str) -> None:
        """Become "whole", "garbage" or "cut", where no connection can be made."""
        self.state = state
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.ends.clear()
        if self.port:
            with suppress(OSError):
                self.listener.shutdown(socket.SHUT_RDWR)
            self.listener.close()
        if state != "cut":
            self.listener = socket.create_server(("127.0.0.1", self.port))
            self.port = self.listener.getsockname()[1]
            threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()


@pytest.fixture
def cable(link: Any) -> Iterator[Cable]:
    made = Cable(link.port)
    yield made
    made.become("cut")


def join(config: RunConfig, run: str) -> JoinRequest:
    model = models.load(config)
    return JoinRequest(run, config.as_json(), model.base_digest, models.shapes(model.arrays()))


def until(what: Callable[[], Any], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
def test_a_supernode_killed_after_the_charge_costs_no_second_one_and_the_same_bytes_are_sent(
    new_node: New, new_config: New
) -> None:
    node, config = new_node(), new_config()
    node.start()
    node.up()
    request = TrainRequest("kept", config.as_json(), 1, models.load(config).arrays())

    def charged() -> int:
        with open_ledger(node.site) as ledger:
            return len(ledger.spends())

    assert charged() == 0
    node.link.send(node.id, "train", request)
    until(charged, 60)
    os.kill(node.status()["supernode"]["pid"], signal.SIGKILL)
    until(lambda: not node.status()["connected_since"], 10)
    node.up(SIGNED_OFF)
    first, second = node.ask("train", request), node.ask("train", request)
    assert first["values"]["message"] == "TrainReply", first
    assert first["values"] == second["values"]
    for name, array in first["arrays"].items():
        for key, values in array.items():
            assert np.array_equal(second["arrays"][name][key], values)
    assert charged() == 1


@pytest.mark.slow
def test_a_node_reconnects_by_itself_when_the_network_comes_back(new_node: New, new_config: New, cable: Cable) -> None:
    node = new_node(coordinator={"address": f"127.0.0.1:{cable.port}"})
    node.start()
    node.up()
    before = node.status()["supernode"]["pid"]
    cable.become("cut")
    until(lambda: not node.status()["connected_since"], 30)
    assert "does not answer; trying again" in node.status()["trouble"]
    time.sleep(5)
    cable.become("whole")
    until(lambda: node.status()["connected_since"], 60)
    assert node.status()["supernode"]["pid"] == before
    assert node.ask("join", join(new_config(), "back"), FORGOTTEN)["values"]["message"] == "JoinReply"


@pytest.mark.slow
def test_a_supernode_that_lives_on_without_working_is_started_again(
    new_node: New, new_config: New, cable: Cable
) -> None:
    node = new_node(coordinator={"address": f"127.0.0.1:{cable.port}"})
    node.start()
    node.up()
    before = node.status()["supernode"]["pid"]
    cable.become("garbage")
    until(lambda: node.status()["supernode"]["pid"] not in (None, before), 60)
    cable.become("whole")
    node.up(FORGOTTEN)
    assert node.ask("join", join(new_config(), "again"))["values"]["message"] == "JoinReply"


@pytest.mark.slow
def test_a_revoked_key_is_said_in_one_line_and_the_node_waits(new_node: New) -> None:
    node = new_node()
    node.start()
    node.up()
    node.link.flwr("supernode", "unregister", str(node.id), "test")
    until(lambda: "not enrolled, or was revoked" in node.status()["trouble"], 60)
    starts = node.status()["supernode"]["starts"]
    time.sleep(10)
    assert node.status()["supernode"]["starts"] <= starts + 1, "a refused key is tried slowly"
    assert node.process.poll() is None
    assert node.log.count("not enrolled, or was revoked") == 1
