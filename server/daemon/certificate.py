"""The coordinator's certificate, looked at as sites and users will: chain, names, dates, and the key's file."""

import ssl
from datetime import UTC, datetime, timedelta

from cryptography import x509

from server.daemon.settings import Settings, is_loopback
from shared.errors import ConfigError

RENEW = timedelta(days=14)  # before its end
REMEDY = "make a new one with `moonflower provision renew --coordinator`"


def inspect(settings: Settings) -> str:
    """Give what the certificate is for and until when.

    Raises
    ------
    ConfigError
        Where a file cannot be read or is open to others, where OpenSSL does not accept chain, purpose, dates or names,
        or where the certificate ends within `RENEW`.
    """
    tls = settings.tls
    for name, path in (("ca", tls.ca), ("certificate", tls.certificate), ("key", tls.key)):
        try:
            path.read_bytes()
        except OSError as error:
            raise ConfigError(f"tls.{name}={str(path)!r} cannot be read: {error.strerror}.") from None
    if (mode := tls.key.stat().st_mode & 0o777) & 0o077:
        raise ConfigError(f"tls.key={str(tls.key)!r} has mode {mode:04o}, so that others may read it: chmod 600 it.")
    try:
        certificate = x509.load_pem_x509_certificate(tls.certificate.read_bytes())
        names = _names(certificate)
    except (ValueError, x509.ExtensionNotFound):
        raise ConfigError(f"tls.certificate={str(tls.certificate)!r} is no server's certificate; {REMEDY}.") from None
    # Before the chain, because OpenSSL's word for it leaves out the day.
    now, end = datetime.now(UTC), certificate.not_valid_after_utc
    if now >= end:
        raise ConfigError(f"tls.certificate={str(tls.certificate)!r} ended on {end:%Y-%m-%d}; {REMEDY}.")
    for name in names:
        _handshake(settings, name)
    if not is_loopback(settings.gateway.host) and all(is_loopback(name) for name in names):
        raise ConfigError(
            f"tls.certificate={str(tls.certificate)!r} names this machine's loopback alone, and gateway.host="
            f"{settings.gateway.host!r} is for others; name the host in federation.toml, and provision again."
        )
    if now >= end - RENEW:
        raise ConfigError(f"tls.certificate={str(tls.certificate)!r} ends on {end:%Y-%m-%d}; {REMEDY}.")
    return f"for {', '.join(names)} until {end:%Y-%m-%d}"


def _names(certificate: x509.Certificate) -> list[str]:
    given = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*given.get_values_for_type(x509.DNSName), *map(str, given.get_values_for_type(x509.IPAddress))]


def _handshake(settings: Settings, name: str) -> None:
    """Shake hands with ourselves in memory, as a client that trusts `ca` alone and calls `name`."""
    tls = settings.tls
    ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        ours.load_cert_chain(tls.certificate, tls.key, lambda: b"")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"tls.key={str(tls.key)!r} is not the key of {tls.certificate}; put the right one there."
            ) from None
        raise ConfigError(f"tls.key={str(tls.key)!r} cannot be used: {error.reason}; {REMEDY}.") from None
    try:
        theirs = ssl.create_default_context(cafile=tls.ca)
    except ssl.SSLError:
        raise ConfigError(f"tls.ca={str(tls.ca)!r} holds no certificate; take ca.pem from the kit.") from None
    theirs.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = ours.wrap_bio(up, down, server_side=True)
    client = theirs.wrap_bio(down, up, server_hostname=name)
    for side in (client, server, client):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(
                f"tls.certificate={str(tls.certificate)!r} is refused for {name} by whoever trusts {tls.ca}: "
                f"{error.verify_message}; {REMEDY}."
            ) from None
