"""Certificates, by what OpenSSL, ssh-keygen's formats and Flower make of them."""

import os
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from hypothesis import given
from hypothesis import strategies as st

from shared import certificates
from shared.certificates import Pair
from shared.errors import ConfigError

NAMES = ["coordinator.example.org", "192.0.2.7", "2001:db8::7"]


@pytest.fixture(scope="module")
def ca() -> Pair:
    return certificates.authority("north", 100)


@pytest.fixture(scope="module")
def server(ca: Pair) -> Pair:
    return certificates.issue(ca, "north", NAMES, 99)


def shake_hands(folder: Path, pair: Pair, ca: bytes, name: str) -> str:
    """Connect as a strict client that trusts `ca` alone; give the cipher, or raise what the client said."""
    (folder / "server.pem").write_bytes(pair.certificate)
    certificates.write_key(folder / "server.key", pair.key)
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ours.load_cert_chain(folder / "server.pem", folder / "server.key")
    theirs = ssl.create_default_context(cadata=ca.decode())
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    there, here = ours.wrap_bio(up, down, server_side=True), theirs.wrap_bio(down, up, server_hostname=name)
    for side in (here, there, here, there):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    cipher = here.cipher()
    assert cipher is not None
    return cipher[0]


@pytest.mark.parametrize("name", NAMES)
def test_a_strict_client_reaches_the_server_under_each_of_its_names(
    tmp_path: Path, ca: Pair, server: Pair, name: str
) -> None:
    assert shake_hands(tmp_path, server, ca.certificate, name)


@pytest.mark.parametrize("name", ["example.org", "x.coordinator.example.org", "192.0.2.8", "localhost"])
def test_under_another_name_it_is_refused(tmp_path: Path, ca: Pair, server: Pair, name: str) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(tmp_path, server, ca.certificate, name)


def test_another_authority_of_the_same_name_is_refused(tmp_path: Path, server: Pair) -> None:
    other = certificates.authority("north", 100)
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, server, other.certificate, NAMES[0])


def test_a_certificate_that_ended_is_refused(tmp_path: Path, ca: Pair) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake_hands(tmp_path, certificates.issue(ca, "north", NAMES, 0), ca.certificate, NAMES[0])


def test_a_server_cannot_sign_for_others(tmp_path: Path, ca: Pair, server: Pair) -> None:
    stolen = certificates.issue(server, "north", NAMES, 1)
    stolen = Pair(stolen.certificate + server.certificate, stolen.key)  # with its whole chain
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA"):
        shake_hands(tmp_path, stolen, ca.certificate, NAMES[0])


def test_a_certificate_does_not_outlive_its_authority(ca: Pair) -> None:
    with pytest.raises(ConfigError, match="of 101 days would outlive its authority, which ends in 99 days"):
        certificates.issue(ca, "north", NAMES, 101)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl program is not installed")
def test_openssl_finds_all_that_a_certificate_should_say(tmp_path: Path, ca: Pair, server: Pair) -> None:
    (tmp_path / "ca.pem").write_bytes(ca.certificate)
    (tmp_path / "server.pem").write_bytes(server.certificate)
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "ca.pem", "server.pem"]
    done = subprocess.run(verify, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "server.pem: OK\n"
    shown = ["openssl", "x509", "-noout", "-text", "-in"]
    said = {
        name: subprocess.run([*shown, name], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for name in ("ca.pem", "server.pem")
    }
    for part in ("CA:TRUE, pathlen:0", "Certificate Sign, CRL Sign", "secp384r1", "ecdsa-with-SHA384"):
        assert part in said["ca.pem"]
    for part in ("CA:FALSE", "Digital Signature\n", "TLS Web Server Authentication\n", "secp384r1", "Key Identifier"):
        assert part in said["server.pem"]
    assert "TLS Web Client" not in said["server.pem"]


def test_loopback_certificates_work_and_leave_no_authority_behind(tmp_path: Path) -> None:
    first = certificates.loopback(tmp_path / "tls")
    keys = {first.key.read_bytes()}
    for name in ("localhost", "127.0.0.1"):
        pair = Pair(first.certificate.read_bytes(), first.key.read_bytes())
        assert shake_hands(tmp_path, pair, first.ca.read_bytes(), name)
    files = sorted(path.name for path in (tmp_path / "tls").iterdir())
    assert files == ["ca.pem", "server.key", "server.pem"]  # the authority's own key is gone
    assert first.key.stat().st_mode & 0o777 == 0o600
    keys.add(certificates.loopback(tmp_path / "tls").key.read_bytes())
    assert len(keys) == 2


def test_a_secret_is_for_its_owner_from_its_first_byte_whatever_was_there(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    path.write_bytes(b"old")
    path.chmod(0o644)
    before = os.umask(0)
    try:
        certificates.write_key(path, b"new")
    finally:
        os.umask(before)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_is_not_in_what_a_log_would_show(ca: Pair) -> None:
    assert "PRIVATE" not in repr(ca)
    assert "CERTIFICATE" in repr(ca)


def test_a_sites_key_is_what_flower_reads_and_verifies() -> None:
    from flwr.supercore.primitives.asymmetric import sign_message, verify_signature

    private, line = certificates.new_node_key()
    key = load_ssh_private_key(private, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP384R1)
    public = load_ssh_public_key(line.encode())
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert verify_signature(public, b"message", sign_message(key, b"message"))
    with pytest.raises(ValueError, match="PEM"):
        load_pem_private_key(line.encode(), None)
    assert certificates.new_node_key() != (private, line)


def test_a_public_key_is_one_line_without_a_comment() -> None:
    _, line = certificates.new_node_key()
    assert certificates.node_key_line(f"  {line} st-marys@north\n") == line


def _line(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def test_a_key_of_another_kind_is_refused() -> None:
    private, line = certificates.new_node_key()
    others = [_line(Ed25519PrivateKey.generate()), _line(ec.generate_private_key(ec.SECP256R1()))]
    for text in (*others, private.decode(), line[:-9], line.split()[1], ""):
        with pytest.raises(ConfigError, match="is no site's public key"):
            certificates.node_key_line(text)


@given(st.text(st.characters(), max_size=60))
def test_any_other_text_is_no_key(text: str) -> None:
    with pytest.raises(ConfigError, match="is no site's public key"):
        certificates.node_key_line(text)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "a b",
        "https://a.org",
        "a.org:9443",
        "-a.org",
        "a..org",
        "*",
        "*.a.org",
        "bücher.org",
        "1.2.3",
        "a" * 254,
        "a\n",
    ],
)
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="is no host name and no address"):
        certificates.alternative_name(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])  # noqa: S104
def test_all_addresses_are_not_an_address(host: str) -> None:
    with pytest.raises(ConfigError, match="no address that anyone can reach"):
        certificates.alternative_name(host)
