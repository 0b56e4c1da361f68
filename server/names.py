"""Which site a node is: not what it says, but what the key that it proves itself with was enrolled under."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from server.history.records import SiteKey
from server.mail import Node


def enrolled(nodes: Mapping[int, Node], keys: Sequence[SiteKey]) -> dict[int, str]:
    """Return the site of each node whose key is enrolled and not revoked."""
    sites = {key.public_key: key.site for key in keys if key.revoked_at is None}
    lines = {node.id: _line(node.public_key) for node in nodes.values()}
    return {node: sites[line] for node, line in lines.items() if line in sites}


@lru_cache(maxsize=4096)
def _line(pem: bytes) -> str:
    """Write a key as OpenSSH does, in one line without a comment; empty where it is no key."""
    try:
        key = load_pem_public_key(pem)
        return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    except ValueError:
        return ""
