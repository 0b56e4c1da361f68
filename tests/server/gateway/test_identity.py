"""The door and the SuperLink agree on who signed, and the door asks first."""

from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from doors import Site, new_site, signed
from fastapi import HTTPException
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.proto.fleet_pb2 import ActivateNodeRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.superlink.routers.fleet.node_auth import authenticate_node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from server.gateway.identity import NEWEST, OLDEST, Enrolled
from server.gateway.request import ACTIVATE, IDENTITY, Head, Refusal
from shared.errors import ConfigError

PULL = b"/v1/fleet/pull-messages"


def ours(headers: dict[str, str], enrolled: Enrolled, path: bytes = PULL) -> str:
    return enrolled.site(Head(path, {name.encode(): value.encode() for name, value in headers.items()}, 0))


def passes_ours(headers: dict[str, str], enrolled: Enrolled) -> bool:
    try:
        ours(headers, enrolled)
    except Refusal:
        return False
    return True


def passes_theirs(headers: dict[str, str], public: bytes) -> bool:
    """Whether flwr's own check takes these headers for a node that activates itself."""
    request = Request({"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})
    request.scope["state"] = {"protobuf_request": ActivateNodeRequest(public_key=public)}
    try:
        authenticate_node(request)
    except HTTPException:
        return False
    return True


def pem(site: Site) -> bytes:
    key = load_ssh_private_key(site.key.read_bytes(), None)
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_headers_and_window_are_flowers() -> None:
    theirs = (FLEET_HTTP_PUBLIC_KEY_HEADER, TIMESTAMP_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
    assert tuple(name.decode() for name in IDENTITY) == theirs
    assert (NEWEST, OLDEST) == (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE)


def signed_text(site: Site, timestamp: str) -> dict[str, str]:
    key = load_ssh_private_key(site.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signature = b64encode(key.sign(timestamp.encode(), ec.ECDSA(SHA256()))).decode()
    return {**signed(site), "flwr-timestamp": timestamp, "flwr-signature": signature}


def utc(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


CASES: dict[str, Callable[[Site, Site], dict[str, str]]] = {
    "right": lambda site, _: signed(site),
    "four minutes old": lambda site, _: signed_text(site, utc(-240)),
    "303 seconds old": lambda site, _: signed_text(site, utc(-303)),
    "307 seconds old": lambda site, _: signed_text(site, utc(-307)),
    "3 seconds ahead": lambda site, _: signed_text(site, utc(3)),
    "7 seconds ahead": lambda site, _: signed_text(site, utc(7)),
    "in another zone": lambda site, _: signed_text(site, datetime.now(timezone(timedelta(hours=5))).isoformat()),
    "in no zone": lambda site, _: signed_text(site, datetime.now(UTC).replace(tzinfo=None).isoformat()),
    "in year one": lambda site, _: signed_text(site, "0001-01-01T00:00:00+23:59"),
    "with a Z": lambda site, _: signed_text(site, utc(0).replace("+00:00", "Z")),
    "only a day": lambda site, _: signed_text(site, datetime.now(UTC).date().isoformat()),
    "no time": lambda site, _: signed_text(site, "now"),
    "no key": lambda site, _: {k: v for k, v in signed(site).items() if "key" not in k},
    "no signature": lambda site, _: {k: v for k, v in signed(site).items() if "signature" not in k},
    "no timestamp": lambda site, _: {k: v for k, v in signed(site).items() if "timestamp" not in k},
    "no headers": lambda site, _: {},
    "key not in base64": lambda site, _: {**signed(site), "flwr-public-key": "!!!"},
    "key with a space": lambda site, _: {**signed(site), "flwr-public-key": signed(site)["flwr-public-key"] + " A"},
    "signature of another time": lambda site, _: {**signed(site), "flwr-timestamp": utc(-1)},
    "signature of another key": lambda site, other: {
        **signed(other),
        "flwr-public-key": signed(site)["flwr-public-key"],
    },
    "empty signature": lambda site, _: {**signed(site), "flwr-signature": ""},
    "key as one line": lambda site, _: {**signed(site), "flwr-public-key": b64encode(site.public.encode()).decode()},
}


@pytest.mark.parametrize("case", CASES)
def test_the_door_decides_as_the_superlink_would(case: str, site: Site, tmp_path: Path) -> None:
    headers = CASES[case](site, new_site(tmp_path, "other"))
    assert passes_ours(headers, Enrolled({site.public: "north"})) == passes_theirs(headers, pem(site))
    assert passes_ours(headers, Enrolled({site.public: "north"})) == (
        case in ("right", "four minutes old", "303 seconds old", "3 seconds ahead", "in another zone", "with a Z")
    )


@given(
    name=st.sampled_from(["flwr-public-key", "flwr-timestamp", "flwr-signature"]),
    at=st.integers(0, 500),
    with_=st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=3),
    cut=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_door_lets_nothing_in_that_the_superlink_would_not(
    site: Site, name: str, at: int, with_: str, cut: int
) -> None:
    headers = signed(site)
    value = headers[name]
    place = at % len(value)
    headers[name] = value[:place] + with_ + value[place + cut :]
    if passes_ours(headers, Enrolled({site.public: "north"})):
        assert passes_theirs(headers, pem(site))


def test_a_key_that_is_not_enrolled_is_told_so_in_words_where_its_node_prints_them(site: Site) -> None:
    for path, status in ((ACTIVATE, 412), (PULL, 401)):
        with pytest.raises(Refusal, match="not enrolled here, or was revoked") as refusal:
            ours(signed(site), Enrolled(), path)
        assert (refusal.value.status, refusal.value.code) == (status, 9401)


def test_a_wrong_clock_is_told_by_how_much(site: Site) -> None:
    with pytest.raises(Refusal, match=r"40[01] s behind") as refusal:
        ours(signed_text(site, utc(-400)), Enrolled({site.public: "north"}), ACTIVATE)
    assert refusal.value.code == 9402


def test_replacing_the_keys_counts_at_once(site: Site, tmp_path: Path) -> None:
    other = new_site(tmp_path, "south")
    enrolled = Enrolled({site.public: "north"})
    assert ours(signed(site), enrolled) == "north"
    enrolled.replace({other.public + " a comment": "south"})
    assert ours(signed(other), enrolled) == "south"
    assert not passes_ours(signed(site), enrolled)


def test_a_line_that_is_no_key_leaves_the_enrolled_ones_as_they_were(site: Site) -> None:
    enrolled = Enrolled({site.public: "north"})
    with pytest.raises(ConfigError, match="no site's public key"):
        enrolled.replace({"ssh-ed25519 AAAA": "south"})
    assert ours(signed(site), enrolled) == "north"
