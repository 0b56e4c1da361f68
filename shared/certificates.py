"""Certificates and keys: a federation's own authority, server certificates, and the keys of sites.

One authority signs the coordinator's certificate; sites and users trust that authority and no other, so no public
one is involved. Keys are on EC P-384. Certificates carry what a strict verifier asks for (RFC 5280, section 4.2):
basic constraints, key usage, purpose, and the identifiers of both keys.

Whatever is called a key here is private, and secret: nothing prints it, and its file is 0600 from its first byte.
"""

import ipaddress
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
SLACK = timedelta(hours=1)  # a certificate holds from an hour ago: clocks differ
LOOPBACK_DAYS = 3650  # of an authority whose key is gone as soon as it has signed once
_HOST = re.compile(r"(?=.{1,253}$)(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")


@dataclass(frozen=True)
class Pair:
    """A certificate, public, and its private key, both PEM."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True)
class Loopback:
    """Files of a certificate for this machine alone: the authority's certificate, the certificate, its key (0600)."""

    ca: Path
    certificate: Path
    key: Path


def authority(name: str, days: int) -> Pair:
    """Make an authority that signs server certificates and no further authority.

    Parameters
    ----------
    name
        What a person reads in it: the federation's name.
    days
        How long it holds, from now.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name[:40]} federation authority")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(identifier, critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(key, hashes.SHA384())
    )
    return _pair(certificate, key)


def issue(authority: Pair, name: str, hosts: Sequence[str], days: int) -> Pair:
    """Sign a server certificate, with a new key, for the names and addresses under which the server is reached.

    Raises
    ------
    ConfigError
        Where a host is no name and no address, or the certificate would outlive its authority.
    """
    ca = x509.load_pem_x509_certificate(authority.certificate)
    signer = load_pem_private_key(authority.key, None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            "the authority's key is not on an elliptic curve; use the one that `moonflower provision` made."
        )
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    if end > ca.not_valid_after_utc:
        left = (ca.not_valid_after_utc - now).days
        raise ConfigError(
            f"a certificate of {days} days would outlive its authority, which ends in {left} days; ask for at most that."
        )
    key = ec.generate_private_key(ec.SECP384R1())
    identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(max(now - SLACK, ca.not_valid_before_utc))
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([alternative_name(host) for host in hosts]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier), critical=False)
        .sign(signer, hashes.SHA384())
    )
    return _pair(certificate, key)


def loopback(folder: Path) -> Loopback:
    """Write an authority's certificate and a server certificate for this machine's loopback names into a folder.

    For a process's own inner connections; made anew at each start, over what was there. The authority's key is never
    written: it signs once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ca = authority("loopback", LOOPBACK_DAYS + 1)
    pair = issue(ca, "loopback", LOOPBACK, LOOPBACK_DAYS)
    files = Loopback(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    write_key(files.key, pair.key)
    files.ca.write_bytes(ca.certificate)
    files.certificate.write_bytes(pair.certificate)
    return files


def new_node_key() -> tuple[bytes, str]:
    """Make a site's key on EC P-384: the private key as OpenSSH PEM (what a SuperNode reads), the public one as its line."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    return private, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def node_key_line(text: str) -> str:
    """Give a site's public key as the one line under which it is enrolled: type and key, without a comment.

    Raises
    ------
    ConfigError
        Where the text is no OpenSSH public key on EC P-384.
    """
    try:
        key = load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise ConfigError(
            f"{text.strip()[:40]!r} is no site's public key: one line that begins with ecdsa-sha2-nistp384 is needed."
        )
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def alternative_name(host: str) -> x509.GeneralName:
    """Give a host as a certificate names it.

    Raises
    ------
    ConfigError
        Where it is neither an address nor a host name in ASCII.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _HOST.fullmatch(host) or host.rpartition(".")[2].isdigit():
            raise ConfigError(
                f"{host!r} is no host name and no address; write it as coordinator.example.org or 192.0.2.7, without a port."
            ) from None
        return x509.DNSName(host.lower())
    if address.is_unspecified:
        raise ConfigError(f"{host!r} is no address that anyone can reach; name the host as the sites will.")
    return x509.IPAddress(address)


def write_key(path: Path, content: bytes) -> None:
    """Write a secret's file, 0600 from its first byte, durable, over what was there."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as fresh:  # mode 0600
        try:
            fresh.write(content)
            fresh.flush()
            os.fsync(fresh.fileno())
            Path(fresh.name).replace(path)
        except BaseException:
            Path(fresh.name).unlink()
            raise


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _pair(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Pair:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Pair(certificate.public_bytes(Encoding.PEM), private)
