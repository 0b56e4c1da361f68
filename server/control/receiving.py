"""An exported model as it arrives: a tar with a digest at its end, put in place as a folder, whole or not at all."""

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from server.control import coordinator_pb2 as pb
from shared.errors import ConfigError, MoonflowerError

NAME = re.compile(r"\.?\w[\w.-]{0,99}(/\.?\w[\w.-]{0,99}){0,3}", re.ASCII)  # of a file, with its folders


@dataclass(frozen=True)
class Written:
    """What arrived."""

    files: list[str]
    bytes: int  # of the tar
    sha256: str


def check(out: Path) -> None:
    """Refuse a place that cannot take the folder.

    Raises
    ------
    ConfigError
        It exists, or the folder around it is missing or cannot be written to.
    """
    parent = out.absolute().parent
    if out.exists():
        raise ConfigError(f"--out {out} exists; name a folder to make.")
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"--out {out}: {parent} is no folder that can be written to; make it, or write elsewhere.")


def write(parts: Iterable[pb.ExportModelResponse], out: Path) -> Written:
    """Receive the tar, compare its digest, unpack it beside its place, and put it there.

    Raises
    ------
    ConfigError
        The place cannot take it.
    MoonflowerError
        What arrived is not what was sent.
    """
    check(out)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent))
    try:
        packed, folder = part / "tar", part / "folder"
        size, digest = _receive(parts, packed)
        folder.mkdir()
        _unpack(packed, folder)
        folder.rename(out)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return Written(files, size, digest)


def _unpack(packed: Path, folder: Path) -> None:
    """Unpack plain files, and nothing else that a tar can hold.

    Python's own `filter="data"` follows links out of the folder in releases that are still in use (CVE-2025-4517).
    """
    try:
        with tarfile.open(packed, "r:") as archive:  # not compressed: a small one cannot become a large one
            for member in archive:
                plain = member.type in tarfile.REGULAR_TYPES and not member.issparse()
                source = archive.extractfile(member) if plain and NAME.fullmatch(member.name) else None
                if source is None or (folder / member.name).exists():
                    raise MoonflowerError(f"what arrived holds {member.name[:80]!r}, which is no new plain file.")
                (folder / member.name).parent.mkdir(parents=True, exist_ok=True)
                with source, (folder / member.name).open("xb") as file:
                    shutil.copyfileobj(source, file)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise MoonflowerError(f"what arrived is no tar: {error}.") from None


def _receive(parts: Iterable[pb.ExportModelResponse], packed: Path) -> tuple[int, str]:
    digest, size, expected = hashlib.sha256(), 0, ""
    with packed.open("wb") as file:
        for each in parts:
            if each.HasField("sha256"):
                expected = each.sha256
            else:
                file.write(each.data)
                digest.update(each.data)
                size += len(each.data)
    if digest.hexdigest() != expected:
        raise MoonflowerError(
            f"the model did not arrive whole: SHA-256 {digest.hexdigest()[:16]} of {size} bytes, "
            f"and {expected[:16] or 'none'} was announced; fetch it again."
        )
    return size, expected
