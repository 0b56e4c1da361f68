"""Make the kits of a federation, and later renew or revoke a party of it.

OUT/federation.toml    what all of it was made from
OUT/authority/         the authority's certificate and its key, which is in no kit: keep it off the coordinator
OUT/coordinator/       a kit; its enrolment.json and tokens.json are what renewing and revoking go on from
OUT/sites/NAME/        a kit each
OUT/users/NAME/        a kit each

Beside each kit is its zip. A kit that has been handed over may be deleted here. One that runs where it was made, for a
trial, keeps what came to lie in it, a ledger above all, and the settings that were changed in it.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from cryptography import x509

from server.control import tokens
from server.control.tokens import Token, TokenFile
from server.provision import enrolment, federation, kits
from server.provision.enrolment import Enrolment, SiteKey
from server.provision.federation import Federation, Site, User
from shared.certificates import Pair, authority, issue, new_node_key, write_key
from shared.errors import ConfigError, NotFoundError
from shared.locks import hold

FEDERATION, AUTHORITY, COORDINATOR, SITES, USERS = "federation.toml", "authority", "coordinator", "sites", "users"
CA_KEY = "ca.key"


def make(source: Path, out: Path) -> Federation:
    """Make all kits of a federation.toml in a new folder: whole, or not at all.

    Raises
    ------
    ConfigError
        Where federation.toml has a fault, or `out` exists.
    """
    fed = federation.load(source)
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"--out={str(out)!r} exists, and may hold keys; name a new folder, or use `provision renew` or `add`."
        )
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=f".{out.name}-") as temporary:  # mode 0700
            _fill(Path(temporary) / "kits", fed, source.read_bytes())
            (Path(temporary) / "kits").rename(out)
    except OSError as error:
        raise ConfigError(
            f"--out={str(out)!r} cannot be made: {error.strerror}; name a folder that you may write."
        ) from None
    return fed


def add(out: Path, source: Path) -> tuple[list[str], list[str]]:
    """Make kits for the sites and users that a changed federation.toml names in addition; give their names.

    Raises
    ------
    ConfigError
        Where it is another federation, or leaves out or renames who has a kit: that is what revoking is for.
    """
    fed = federation.load(source)
    with _at_work(out) as kept:
        if fed.name != kept.name or fed.coordinator != kept.coordinator:
            raise ConfigError(
                f"{source}: name and [coordinator] must be as in {out / FEDERATION}; they stand in every kit."
            )
        for kind, now, before in (("sites", fed.sites, kept.sites), ("users", fed.users, kept.users)):
            if gone := {party.name for party in before} - {party.name for party in now}:
                raise ConfigError(
                    f"{source}: {kind} no longer names {sorted(gone)[0]!r}; to end it, use `provision revoke`."
                )
        sites = [site for site in fed.sites if site.name not in {before.name for before in kept.sites}]
        users = [user for user in fed.users if user.name not in {before.name for before in kept.users}]
        for site in sites:
            _renew_site(out, fed, site)
        for user in users:
            _renew_user(out, fed, user, user.days)
        write_key(out / FEDERATION, source.read_bytes())
    return [site.name for site in sites], [user.name for user in users]


def renew_coordinator(out: Path, days: int | None = None) -> datetime:
    """Give the coordinator a new key and certificate, for its hosts as they were; return when it ends."""
    with _at_work(out) as fed:
        ca = Pair(_bytes(out / AUTHORITY / kits.CA), _bytes(out / AUTHORITY / CA_KEY))
        pair = issue(ca, fed.name, fed.coordinator.names, days or fed.coordinator.certificate_days)
        kits.change(out / COORDINATOR, {kits.CERTIFICATE: pair.certificate, kits.KEY: pair.key})
    return x509.load_pem_x509_certificate(pair.certificate).not_valid_after_utc


def renew_site(out: Path, name: str) -> None:
    """Give a site a new key in a new kit. The one that it had is revoked."""
    with _at_work(out) as fed:
        _renew_site(out, fed, fed.site(name))


def renew_user(out: Path, name: str, days: int | None = None) -> None:
    """Give a user a new token in a new kit. The ones before are revoked."""
    with _at_work(out) as fed:
        user = fed.user(name)
        _renew_user(out, fed, user, days or user.days)


def revoke_site(out: Path, name: str) -> None:
    """Revoke a site's key, for good, and delete it and the kit's zip here."""
    with _at_work(out):
        after = enrolment.read(out / COORDINATOR / kits.ENROLMENT).revoke(name)
        kits.change(out / COORDINATOR, {kits.ENROLMENT: after.content()})
        _delete(out / SITES / name, kits.SITE_KEY)


def revoke_user(out: Path, name: str) -> None:
    """Revoke a user's token, for good, and delete it and the kit's zip here.

    Raises
    ------
    NotFoundError
        Where the user has none.
    """
    with _at_work(out) as fed:
        before = tokens.read(out / COORDINATOR / kits.TOKENS)
        live = sorted({token.name for token in before.tokens if not token.revoked})
        if name not in live:
            raise NotFoundError(
                f"no token of a user {name!r} is valid; valid are those of: {', '.join(live) or 'nobody'}."
            )
        kits.change(out / COORDINATOR, {kits.TOKENS: _without(before, name).content()})
        _delete(out / USERS / name, f"{fed.name}.token")


def _fill(out: Path, fed: Federation, source: bytes) -> None:
    out.mkdir(mode=0o700)
    place = fed.coordinator
    ca = authority(fed.name, place.authority_days)
    (out / AUTHORITY).mkdir(mode=0o700)
    write_key(out / AUTHORITY / kits.CA, ca.certificate)
    write_key(out / AUTHORITY / CA_KEY, ca.key)
    write_key(out / FEDERATION, source)  # it may hold the database's password
    keys: list[SiteKey] = []
    for site in fed.sites:
        private, public = new_node_key()
        kits.write(out / SITES / site.name, kits.site(fed, site, ca.certificate, private))
        keys.append(SiteKey(name=site.name, public_key=public))
    known: list[Token] = []
    for user in fed.users:
        token, secret = tokens.new(user.name, user.role, user.days)
        kits.write(out / USERS / user.name, kits.user(fed, token, ca.certificate, secret))
        known.append(token)
    server = issue(ca, fed.name, place.names, place.certificate_days)
    enrolled, token_file = Enrolment(sites=tuple(keys)), TokenFile(tokens=tuple(known))
    kits.write(out / COORDINATOR, kits.coordinator(fed, ca.certificate, server, enrolled, token_file))


@contextmanager
def _at_work(out: Path) -> Iterator[Federation]:
    """Hold a folder of kits, and give what it was made from."""
    if not (out / FEDERATION).exists() or not (out / COORDINATOR / kits.ENROLMENT).exists():
        raise ConfigError(
            f"{str(out)!r} is no folder of kits; name the one that `moonflower provision FILE --out` made."
        )
    with hold(out / ".lock", f"the folder {out}"):
        yield federation.load(out / FEDERATION)


def _renew_site(out: Path, fed: Federation, site: Site) -> None:
    private, public = new_node_key()
    after = enrolment.read(out / COORDINATOR / kits.ENROLMENT).renew(site.name, public)
    # The kit first: if this stops half-way, no key is enrolled that nobody holds.
    _replace(out / SITES / site.name, kits.site(fed, site, _bytes(out / AUTHORITY / kits.CA), private))
    kits.change(out / COORDINATOR, {kits.ENROLMENT: after.content()})


def _renew_user(out: Path, fed: Federation, user: User, days: int) -> None:
    token, secret = tokens.new(user.name, user.role, days)
    before = _without(tokens.read(out / COORDINATOR / kits.TOKENS), user.name)
    _replace(out / USERS / user.name, kits.user(fed, token, _bytes(out / AUTHORITY / kits.CA), secret))
    kits.change(out / COORDINATOR, {kits.TOKENS: TokenFile(tokens=(*before.tokens, token)).content()})


def _without(known: TokenFile, name: str) -> TokenFile:
    revoked = (t.model_copy(update={"revoked": True}) if t.name == name else t for t in known.tokens)
    return TokenFile(tokens=tuple(revoked))


def _replace(folder: Path, files: kits.Files) -> None:
    if folder.exists():  # its owner may have changed the settings in it, a policy above all
        kits.change(
            folder,
            {name: files[name] for name in files if Path(name).suffix != ".toml" or not (folder / name).exists()},
        )
    else:
        kits.write(folder, files)


def _delete(folder: Path, secret: str) -> None:
    (folder / secret).unlink(missing_ok=True)
    kits.archive_of(folder).unlink(missing_ok=True)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; it is needed for this, bring it back first."
        ) from None
