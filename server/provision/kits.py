"""A kit: what one party of a federation needs, as a folder and as a zip of it.

All files are 0600 and all folders 0700, in the zip too. What is another party's secret is not among the arguments of
the function that makes a kit.
"""

import time
import zipfile
from datetime import datetime
from io import BytesIO
from pathlib import Path
from string import Template
from typing import Any

import tomli_w
from cryptography import x509

from server.control.tokens import Token, TokenFile
from server.provision.enrolment import Enrolment
from server.provision.federation import Federation, Site, given
from shared import __version__
from shared.certificates import Pair, write_key

CA, CERTIFICATE, KEY, SITE_KEY = "ca.pem", "server.pem", "server.key", "site.key"
ENROLMENT, TOKENS = "enrolment.json", "tokens.json"
TEMPLATES = Path(__file__).parent / "templates"
Files = dict[str, bytes]


def coordinator(federation: Federation, ca: bytes, server: Pair, enrolment: Enrolment, tokens: TokenFile) -> Files:
    """Make the coordinator's kit."""
    place = federation.coordinator
    settings: dict[str, Any] = {
        "name": federation.name,
        "state": "state",
        **({"database": place.database} if place.database else {}),
        "device": place.device,
        "enrolment": ENROLMENT,
        "tokens": TOKENS,
        "tls": {"ca": CA, "certificate": CERTIFICATE, "key": KEY},
        "gateway": {"host": place.gateway_host, "port": place.gateway_port},
        "control": {"host": place.control_host, "port": place.control_port},
    }
    until = x509.load_pem_x509_certificate(server.certificate).not_valid_after_utc
    return {
        "server.toml": _toml("The coordinator's daemon. Relative paths are relative to this file.", settings),
        CA: ca,
        CERTIFICATE: server.certificate,
        KEY: server.key,
        ENROLMENT: enrolment.content(),
        TOKENS: tokens.content(),
        "moonflower-server.service": (TEMPLATES / "moonflower-server.service").read_bytes(),
        "README.md": _readme("coordinator", federation, until=_day(until)),
    }


def site(federation: Federation, site: Site, ca: bytes, key: bytes) -> Files:
    """Make a site's kit, with its private key."""
    settings = {
        **{"name": site.name, "device": site.device},
        "dataset": given(site.dataset),
        "privacy": given(site.privacy),
        "coordinator": {
            "name": federation.name,
            "address": federation.coordinator.gateway,
            "ca": CA,
            "key": SITE_KEY,
            "state": "state",
        },
    }
    head = "The site's data, what it allows, and its coordinator. Relative paths are relative to this file."
    return {
        "site.toml": _toml(head, settings),
        CA: ca,
        SITE_KEY: key,
        "moonflower-client.service": (TEMPLATES / "moonflower-client.service").read_bytes(),
        "README.md": _readme("site", federation, site=site.name),
    }


def user(federation: Federation, token: Token, ca: bytes, secret: str) -> Files:
    """Make a user's kit, with the token's secret text."""
    name, place = federation.name, federation.coordinator
    server = {"address": place.control, "ca": f"{name}.pem", "token_file": f"{name}.token"}
    tunnel = (
        f" It listens on its own machine alone: work there, or open a tunnel first with\n"
        f"`ssh -N -L {place.control_port}:localhost:{place.control_port} {place.hosts[0]}`."
    )
    return {
        "servers.toml": _toml("Coordinators by name.", {"default": name, "servers": {name: server}}),
        f"{name}.pem": ca,
        f"{name}.token": f"{secret}\n".encode(),
        "README.md": _readme(
            "user",
            federation,
            user=token.name,
            role=token.role,
            until=_day(token.expires_at),
            tunnel=tunnel if place.control_is_local else "",
            only="" if token.allows("admin") else "          # refused: a viewer looks, and needs no more",
        ),
    }


def write(folder: Path, files: Files) -> None:
    """Write a kit: its files into its folder, and the zip of them beside it."""
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    folder.mkdir(mode=0o700)
    change(folder, files)


def change(folder: Path, files: Files) -> None:
    """Write some files of a kit over what was there, and its zip with them. What else lies in the folder is nobody's."""
    archive = archive_of(folder)
    kept: set[str] = set()
    if archive.exists():
        with zipfile.ZipFile(archive) as bundle:
            kept = {name for entry in bundle.namelist() if (folder / (name := Path(entry).name)).exists()}
    for name, content in files.items():
        write_key(folder / name, content)
    now = time.localtime()[:6]
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as bundle:
        for name in sorted(kept | files.keys()):
            entry = zipfile.ZipInfo(f"{folder.name}/{name}", now)
            entry.create_system = 3  # Unix: the mode is kept
            entry.external_attr = 0o100600 << 16
            bundle.writestr(entry, (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)
    write_key(archive, packed.getvalue())


def archive_of(folder: Path) -> Path:
    """Give where a kit's zip is."""
    return folder.with_name(f"{folder.name}.zip")


def _readme(kind: str, federation: Federation, **values: str) -> bytes:
    place = federation.coordinator
    common = {
        "federation": federation.name,
        "gateway": place.gateway,
        "control": place.control,
        "version": __version__,
    }
    template = Template((TEMPLATES / f"{kind}.md").read_text(encoding="utf-8"))
    return template.substitute(common, **values).encode()


def _toml(head: str, values: dict[str, Any]) -> bytes:
    return f"# {head}\n{tomli_w.dumps(values)}".encode()


def _day(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d}"
