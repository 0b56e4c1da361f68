"""A coordinator, called from elsewhere: one method a call, and its errors as a person reads them."""

import secrets
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import grpc

from server.control import coordinator_pb2 as pb
from server.control import coordinator_pb2_grpc
from server.control.target import LOOPBACK, Target
from server.listing import clean
from shared.errors import ConfigError, MoonflowerError, NotFoundError

Code = grpc.StatusCode
TIMEOUT = 70.0  # seconds: above the server's own deadline, so that its answer is the one heard
LONGEST_WAIT = 15.0  # seconds between tries to reconnect
SUBMISSIONS = 4  # tries of one submission
LARGEST_TEST_SET = 64 << 20  # bytes
CERTIFICATE = {  # OpenSSL's number of a fault -> what to do
    9: "is not valid yet; look at the clocks of both machines",
    10: "has expired; whoever runs it issues a new one with `moonflower provision renew`",
    62: "is for another name; call it by a name that it was issued for",
    64: "is for another address; call it by a name or address that it was issued for",
}
OPTIONS = [
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", LARGEST_TEST_SET + (1 << 20)),
    ("grpc.keepalive_time_ms", 20_000),  # a watch finds out that the network is gone
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 5000),
]
R = TypeVar("R")


class AccessError(MoonflowerError):
    """The coordinator does not let the caller in, or is not the one that it should be."""

    exit_code = 2


class UnreachableError(MoonflowerError):
    """The coordinator, or its database, does not answer; the same may work later."""


@dataclass(frozen=True)
class Lost:
    """A watch lost its connection, and tries again after so many seconds."""

    why: str
    wait: float


class Client:
    """A connection to a coordinator; a context manager. All methods raise `MoonflowerError`s."""

    def __init__(self, target: Target) -> None:
        self._target = target
        options = [*OPTIONS, ("grpc.enable_http_proxy", int(target.host not in LOOPBACK))]
        if target.ca is None:
            self._channel = grpc.insecure_channel(target.address, options)
        else:
            credentials = grpc.ssl_channel_credentials(target.ca)
            self._channel = grpc.secure_channel(target.address, credentials, options)
        self._stub = coordinator_pb2_grpc.CoordinatorStub(self._channel)  # type: ignore[no-untyped-call]
        self._metadata = [("authorization", f"Bearer {target.token}")] if target.token else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def call(self, method: str, request: Any) -> Any:
        """Call a method that has one answer."""
        return self._told(lambda: getattr(self._stub, method)(request, metadata=self._metadata, timeout=TIMEOUT))

    def stream(self, method: str, request: Any) -> Iterator[Any]:
        """Call a method that streams its answers."""
        answers = getattr(self._stub, method)(request, metadata=self._metadata)
        try:
            while (answer := self._told(lambda: next(answers, None))) is not None:
                yield answer
        finally:
            answers.cancel()

    def submit(self, config_toml: str, test_set: bytes | None) -> pb.Run:
        """Submit a run. Where an answer is lost it is asked for again: the request makes one run however often it comes."""
        if test_set is not None and len(test_set) > LARGEST_TEST_SET:
            raise ConfigError(
                f"the test set has {len(test_set) >> 20} MiB, above the limit of {LARGEST_TEST_SET >> 20}; take a sample of it."
            )
        request = pb.SubmitRunRequest(request_id=secrets.token_hex(16), config_toml=config_toml, test_set=test_set)
        for number in range(SUBMISSIONS):
            try:
                answer: pb.SubmitRunResponse = self.call("SubmitRun", request)
            except UnreachableError as error:
                if number + 1 == SUBMISSIONS:
                    text = f"{error} If the connection broke, the run may be in the queue: `moonflower run list` tells."
                    raise UnreachableError(text) from None
                time.sleep(0.5 * 2**number)
            else:
                break
        return answer.run

    def watch(self, run: str, after: int = 0) -> Iterator[pb.WatchRunResponse | Lost]:
        """Give a run's progress after a cursor until it has finished, over as many connections as it takes.

        Nothing is missed and nothing comes twice. Only a first connection that fails is an error.
        """
        wait, reached = 0.5, False
        while True:
            try:
                for told in self.stream("WatchRun", pb.WatchRunRequest(run=run, after=after)):
                    wait, reached = 0.5, True
                    if told.HasField("progress"):
                        after = told.progress.id
                    else:
                        run = told.run.id  # `last` would be another one later
                    yield told
                return
            except UnreachableError as error:
                if not reached:
                    raise
                yield Lost(str(error), wait)
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)

    def _told(self, work: Callable[[], R]) -> R:
        try:
            return work()
        except grpc.RpcError as error:
            raise self._explained(error.code(), error.details() or "") from None

    def _explained(self, code: grpc.StatusCode, text: str) -> MoonflowerError:
        line = clean(" ".join(text.split())) or f"gRPC status {code.name}."
        match code:
            case Code.INVALID_ARGUMENT:
                return ConfigError(line)
            case Code.NOT_FOUND:
                return NotFoundError(line)
            case Code.UNAUTHENTICATED | Code.PERMISSION_DENIED:
                return AccessError(f"{self._target.address}: {line}")
            case Code.INTERNAL if "RST_STREAM" not in line:
                return MoonflowerError(f"{self._target.address}: {line}")
            case Code.UNIMPLEMENTED:
                return MoonflowerError(f"{self._target.address} does not know this call; it may be another version.")
        return diagnosis(self._target) or UnreachableError(f"{self._target.address}: {line}")


def diagnosis(target: Target) -> MoonflowerError | None:
    """Look why a coordinator cannot be reached, with a connection of one's own; None where it can."""
    where = target.address
    try:
        with socket.create_connection((target.host, target.port), timeout=5) as raw:
            if target.ca is None:
                return None
            context = ssl.create_default_context(cadata=target.ca.decode(errors="replace"))
            context.set_alpn_protocols(["h2"])
            with context.wrap_socket(raw, server_hostname=target.host):
                return None
    except ssl.SSLCertVerificationError as error:
        other = f"is not by the authority of {target.source}; is that the ca.pem of this coordinator?"
        return AccessError(f"{where}: its certificate {CERTIFICATE.get(error.verify_code, other)}.".replace("?.", "?"))
    except ssl.SSLError as error:
        if error.reason and ("PEM" in error.reason or "NO_START_LINE" in error.reason):
            return ConfigError(f"{target.source} is no certificate in PEM; take the ca.pem of your kit.")
        return UnreachableError(f"{where} does not speak TLS as a coordinator does; is that its control port?")
    except socket.gaierror:
        return UnreachableError(f"{where}: the host's name is not known; check it.")
    except OSError as error:
        said = error.strerror or "no answer within 5 s"
        return UnreachableError(f"{where} does not answer ({said}); is the server running, and the port right?")
