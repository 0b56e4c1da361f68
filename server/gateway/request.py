"""What may pass: a request's head, held against the few that a SuperNode sends. Bodies are looked at elsewhere.

A target passes if it is one of the Fleet API's paths, byte for byte. So there is nothing to normalise: encoded
slashes, dots, queries and absolute addresses are other bytes, and not found. Of the headers, those named here are
written anew; all others, hop-by-hop ones among them, stay outside.
"""

from dataclasses import dataclass

import h11

# flwr.superlink.routers.fleet.router; a test compares. Nodes without keys register themselves; ours never do.
FOR_NODES = frozenset(
    f"/v1/fleet/{name}".encode()
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
FOR_NODES_WITHOUT_KEYS = FOR_NODES | {b"/v1/fleet/register-node", b"/v1/fleet/unregister-node"}
ACTIVATE, PULL_MESSAGES, PUSH_MESSAGES, PUSH_OBJECT = (
    f"/v1/fleet/{name}".encode() for name in ("activate-node", "pull-messages", "push-messages", "push-object")
)

IDENTITY = (b"flwr-public-key", b"flwr-timestamp", b"flwr-signature")
INWARD = frozenset(
    (*IDENTITY, b"content-type", b"accept", b"flwr-package-name", b"flwr-package-version", b"flwr-component-name")
)
OUTWARD = frozenset((b"content-type", b"content-length", b"date", b"flwr-version-incompatibility-message"))

MOST_WORDS = 256 * 1024  # bytes of any other body than a piece of a reply: an envelope of 3,600 pieces
MAX_HEAD = 16 * 1024  # bytes of a request's line and headers; a SuperNode's are about 1 kB


class Refusal(Exception):
    """A request that does not pass: a status, a word for the counters, a line for the other side, a detail for our log.

    SuperNodes stop themselves at 401, take 403 for a run that has ended and go on polling, and try again for as long as
    it takes at 502, 503 and 504. Other statuses end them too; at their first request, activate-node, with the line.
    """

    def __init__(self, status: int, reason: str, text: str, *, code: int | None = None, detail: str = "") -> None:
        super().__init__(text)
        self.status, self.reason, self.text, self.detail = status, reason, text, detail
        self.code = status if code is None else code


@dataclass(frozen=True)
class Head:
    """What is known of a request before its body: its path, the headers that pass, and how many bytes follow."""

    path: bytes
    headers: dict[bytes, bytes]  # lower-case names
    length: int


def check(request: h11.Request, paths: frozenset[bytes], max_bytes: int) -> Head:
    """Hold a parsed head against what may pass.

    Raises
    ------
    Refusal
        404 for any other method or target, 400 for a head that two readers could take differently, 411 and 413 for the
        body's length, 505 for HTTP/1.0.
    """
    if request.method != b"POST" or request.target not in paths:
        asked = (request.method + b" " + request.target).decode("ascii", "replace")
        raise Refusal(404, "path", "not found", detail=asked)
    if request.http_version != b"1.1":
        raise Refusal(505, "version", "HTTP/1.1 is needed")
    passed: dict[bytes, bytes] = {}
    length = None
    for name, value in request.headers:
        if name in (b"transfer-encoding", b"upgrade", b"expect"):
            status = 411 if name == b"transfer-encoding" else 400
            raise Refusal(status, "framing", f"a request with {name.decode()} does not pass; send content-length")
        if name in passed or (name == b"content-length" and length is not None):
            raise Refusal(400, "framing", f"{name.decode()} twice")
        if name == b"content-length":
            length = int(value)
        elif name in INWARD:
            passed[name] = value
    if length is None:
        raise Refusal(411, "framing", "content-length is needed")
    most = max_bytes if request.target == PUSH_OBJECT else min(max_bytes, MOST_WORDS)
    if length > most:
        raise Refusal(413, "size", f"a body of {length} bytes is above this coordinator's limit of {most}")
    return Head(request.target, passed, length)
