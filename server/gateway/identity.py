"""Who asks: the node's key, held against the enrolled ones, and its signature of the time.

As `flwr.superlink.routers.fleet.node_auth` does, on the same three headers and in the same window of time, but before
a body is read and without parsing a key that a stranger sent: enrolled keys are found by their bytes. A test holds
the two against each other. A signature covers the time alone, so TLS is what keeps it from being used again.
"""

import binascii
import threading
from base64 import b64decode
from collections.abc import Mapping
from datetime import UTC, datetime

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from server.gateway.request import ACTIVATE, Head, Refusal
from shared.certificates import node_key_line

OLDEST = 305.0  # seconds before now; flwr.common.constant: TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
NEWEST = 5.0  # seconds after now: SYSTEM_TIME_TOLERANCE

NOT_ENROLLED, WRONG_CLOCK, WRONG_SIGNATURE = (
    9401,
    9402,
    9403,
)  # a SuperNode that may not begin prints "[code: 9401] ..."


class Enrolled:
    """The keys that may enter, and each one's site. Any thread may replace them; the next request counts."""

    def __init__(self, keys: Mapping[str, str] | None = None) -> None:
        self._lock = threading.Lock()
        self._sites: dict[bytes, tuple[str, ec.EllipticCurvePublicKey]] = {}
        self.replace(keys or {})

    def replace(self, keys: Mapping[str, str]) -> None:
        """Take these keys, one-line OpenSSH public keys to sites, instead of those before.

        Raises
        ------
        ConfigError
            Where a line is no key on EC P-384; the keys before stay.
        """
        sites = {}
        for line, site in keys.items():
            key = load_ssh_public_key(node_key_line(line).encode())
            assert isinstance(key, ec.EllipticCurvePublicKey)  # noqa: S101 - node_key_line returns no other
            sites[key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)] = (site, key)
        with self._lock:
            self._sites = sites

    def __len__(self) -> int:
        return len(self._sites)

    def site(self, head: Head, now: datetime | None = None) -> str:
        """Return the site that signed this request.

        Raises
        ------
        Refusal
            Where the key is not enrolled, the time is too far from `now` (the clock's, in UTC), or the signature is not
            that key's. A node that is already at work gets 401, which stops it, in training too; one that begins gets
            a status with which it prints the line.
        """
        status = 412 if head.path == ACTIVATE else 401
        try:
            public_key, timestamp, signature = (
                b64decode(head.headers[b"flwr-public-key"], validate=True),
                head.headers[b"flwr-timestamp"].decode("ascii"),
                b64decode(head.headers[b"flwr-signature"], validate=True),
            )
            age = ((now or datetime.now(UTC)) - datetime.fromisoformat(timestamp)).total_seconds()
        except (KeyError, ValueError, TypeError, OverflowError, binascii.Error):
            raise Refusal(
                status, "signature", "the node's signature is missing or malformed", code=WRONG_SIGNATURE
            ) from None
        found = self._sites.get(public_key)
        if found is None:
            raise Refusal(
                status, "unknown key", "this node's key is not enrolled here, or was revoked", code=NOT_ENROLLED
            )
        site, key = found
        try:
            key.verify(signature, timestamp.encode("ascii"), ec.ECDSA(SHA256()))
        except InvalidSignature:
            raise Refusal(status, "signature", "the node's signature is wrong", code=WRONG_SIGNATURE) from None
        if not -NEWEST < age < OLDEST:
            raise Refusal(
                status,
                "clock",
                f"the node's clock is {abs(age):.0f} s {'behind' if age > 0 else 'ahead'}; set both clocks by NTP",
                code=WRONG_CLOCK,
            )
        return site
