"""The coordinator's door, seen from the site: its certificate, its clock, and whether it lets this key in.

The knock is a node's activation with an impossible heartbeat: signed as a SuperNode signs, read by the coordinator
after the key, and refused without a change of anything. It carries nothing of the site but its public key.
"""

import base64
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_private_key,
)
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from google.protobuf.message import Message as ProtobufMessage

from client.site import Coordinator
from shared.errors import ConfigError

PATIENCE = 5.0  # seconds
AHEAD, BEHIND = 5.0, 300.0  # seconds that a site's clock may be off: beyond, the coordinator refuses what it has signed
WRONG_CLOCK = 9402  # of the coordinator's gateway; and 9401 below, of a SuperLink without one 2004
NOT_ENROLLED = (9401, ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED)
UNKNOWN_KEY = (
    "the coordinator refuses this site's key: it is not enrolled, or was revoked. Ask the coordinator's people; a revoked "
    "key never comes back, a new one is enrolled (moonflower provision renew)."
)


@dataclass(frozen=True)
class Knock:
    """What the door said. `trouble` is one line with the remedy, or empty where this site may enter."""

    trouble: str
    reached: bool = False  # a TLS connection with a certificate of the federation's authority was made
    skew: float | None = None  # seconds that the coordinator's clock is ahead of this machine's, to about one

    @property
    def in_time(self) -> bool:
        """Whether the clocks agree well enough; also where the door did not say."""
        return self.skew is None or -AHEAD - 1 < self.skew < BEHIND

    def clock(self) -> str:
        """Say how the clocks differ, and what to do."""
        skew = self.skew or 0.0
        where = "behind" if skew > 0 else "ahead of"
        return (
            f"this machine's clock is {abs(skew):.0f} s {where} the coordinator's, which takes {AHEAD:.0f} s ahead and "
            f"{BEHIND:.0f} s behind; set it (NTP)."
        )


def knock(coordinator: Coordinator) -> Knock:
    """Ask the coordinator's gateway whether it lets this site's key in.

    Raises
    ------
    ConfigError
        Where the site's key or the authority's certificate cannot be read.
    """
    now = datetime.now(UTC)
    try:
        answer = _signed(coordinator, "activate-node", lambda public: ActivateNodeRequest(public_key=public), now)
    except httpx.ConnectError as error:
        return Knock(_unreached(coordinator, str(error)))
    except httpx.TransportError as error:
        return Knock(f"{coordinator.address} does not answer ({type(error).__name__}); check address and network.")
    said = Knock(_trouble(coordinator, answer), True, _skew(answer, now))
    return said if said.in_time or not said.trouble else Knock(said.clock(), True, said.skew)


def sign_off(coordinator: Coordinator, node: int) -> bool:
    """Tell the coordinator that a connection of this site is over, whose SuperNode has not; return whether it was heard.

    Otherwise the coordinator believes it, and lets no other in, until its heartbeats have been missed for a minute.
    """
    request = DeactivateNodeRequest(node_id=node)
    try:
        answer = _signed(coordinator, "deactivate-node", lambda _: request, datetime.now(UTC))
    except httpx.TransportError:
        return False
    return answer.is_success


def _signed(
    coordinator: Coordinator, call: str, request: Callable[[bytes], ProtobufMessage], now: datetime
) -> httpx.Response:
    """Make one of a node's calls, signed as a SuperNode signs; `request` is given the public key, PEM."""
    key, context = private_key(coordinator.key), trust(coordinator.ca)
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    signed = key.sign(now.isoformat().encode("ascii"), ec.ECDSA(hashes.SHA256()))
    headers = {
        "content-type": PROTOBUF_MEDIA_TYPE,
        "accept": PROTOBUF_MEDIA_TYPE,
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public).decode("ascii"),
        TIMESTAMP_HEADER: now.isoformat(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(signed).decode("ascii"),
    }
    url = f"https://{coordinator.address}/v1/fleet/{call}"
    with httpx.Client(verify=context, timeout=PATIENCE, trust_env=False) as client:
        return client.post(url, content=request(public).SerializeToString(), headers=headers)


def private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read the site's private key.

    Raises
    ------
    ConfigError
        Where there is none, or of another kind.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"[coordinator] key={path} cannot be read: {error.strerror}.") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            f"[coordinator] key={path} is no EC key in OpenSSH's format without a passphrase; use the one of the site's kit."
        )
    return key


def trust(path: Path) -> ssl.SSLContext:
    """Return what trusts the federation's authority and nobody else.

    Raises
    ------
    ConfigError
        Where its certificate cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=path.read_text(encoding="ascii"))
    except OSError as error:
        if isinstance(error, ssl.SSLError):
            raise ConfigError(f"[coordinator] ca={path} holds no certificate; use the kit's ca.pem.") from None
        raise ConfigError(f"[coordinator] ca={path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise ConfigError(f"[coordinator] ca={path} holds no certificate; use the kit's ca.pem.") from None
    return context


def _unreached(coordinator: Coordinator, text: str) -> str:
    if "certificate" in text.lower():
        reason = text.partition("failed: ")[2].partition(" (_ssl")[0] or text
        return (
            f"the certificate of {coordinator.address} is refused ({reason}): another server answers there, or [coordinator] "
            "address and ca are not of this federation's kit."
        )
    return f"{coordinator.address} cannot be reached ({text}); check [coordinator] address, network and firewall."


def _trouble(coordinator: Coordinator, answer: httpx.Response) -> str:
    error = FlowerError.from_json(answer.text)
    if error is not None and error.code == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
        return ""  # the key was found, and then the impossible heartbeat
    if answer.status_code == 401 or (error and error.code in NOT_ENROLLED):
        return UNKNOWN_KEY
    if error and error.code == WRONG_CLOCK:
        return "the coordinator refuses this site's clock; set it (NTP)."
    if answer.status_code in (502, 503, 504):
        return f"{coordinator.address} lets this site in, and its SuperLink is down; it is tried again until it is up."
    return f"{coordinator.address} answers {answer.status_code}, as no coordinator of this version does; check [coordinator] address."


def _skew(answer: httpx.Response, now: datetime) -> float | None:
    try:
        return (parsedate_to_datetime(answer.headers["date"]) - now).total_seconds()
    except (KeyError, ValueError, TypeError):
        return None
