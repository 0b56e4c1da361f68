"""The server's state after each round, as a safetensors file named by its own SHA-256.

A file is whole or absent: it is written beside its place, flushed to the disk, then renamed. The history
names the digest in the round's transaction, so a file without a round is an orphan and a round never
lacks its file.
"""

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from server.history.records import Checkpoint
from server.optimization import ServerState
from shared.arrays import Arrays
from shared.errors import MachineError, NotFoundError
from shared.packages import file_digest

SECTIONS = ("iterate", "published", "first", "second")


def write(folder: Path, state: ServerState) -> Checkpoint:
    """Put `state` on the disk, durable before this returns.

    Raises
    ------
    MachineError
        Where the disk does not take it; nothing of it is left there, and the run can be resumed when it does.
    """
    tensors = {f"{section}/{name}": array for section in SECTIONS for name, array in getattr(state, section).items()}
    # One entry: safetensors writes several in any order, and equal states must have equal digests.
    data = save(
        tensors, metadata={"state": json.dumps({"steps": state.steps, "phase": state.phase, "base": state.base})}
    )
    try:
        return _write(folder, data)
    except OSError as error:
        raise MachineError(
            f"a checkpoint of {len(data)} bytes cannot be written to {folder}: {error.strerror}; mend that, then resume the run."
        ) from None


def _write(folder: Path, data: bytes) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(data).hexdigest()  # of what was to be written: half of it is not taken for it
    handle, name = tempfile.mkstemp(dir=folder, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).rename(path(folder, digest))
    except OSError:
        with suppress(OSError):
            Path(name).unlink()  # on a full disk, room for the next try
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Checkpoint(digest, len(data))


def read(folder: Path, digest: str) -> ServerState:
    """Read a checkpoint back, checked against its name.

    Raises
    ------
    NotFoundError
        Where the file is missing or is not what its name says.
    """
    place = path(folder, digest)
    if not place.is_file():
        raise NotFoundError(f"checkpoint {place} is missing; restore it from a backup to resume this run.")
    if file_digest(place) != digest:
        raise NotFoundError(
            f"checkpoint {place} is damaged: its content is not what its name says; restore it from a backup."
        )
    try:
        with safe_open(place, framework="numpy") as held:
            sections: dict[str, Arrays] = {section: {} for section in SECTIONS}
            for key in held.keys():  # noqa: SIM118 - not a dict
                section, _, name = key.partition("/")
                sections[section][name] = held.get_tensor(key)
            metadata = json.loads(held.metadata()["state"])
    except SafetensorError as error:
        raise NotFoundError(f"checkpoint {place} cannot be read: {error}.") from None
    return ServerState(**sections, steps=metadata["steps"], phase=metadata["phase"], base=metadata.get("base", ""))


def prune(folder: Path, keep: set[str], before: datetime) -> None:
    """Delete the files from before a time whose digests are not in `keep`, orphans of killed writes included.

    `before` is when the round began that the caller has committed: what is younger may be the next round's file,
    written by an attempt that took the run over since.
    """
    names = {path(folder, digest).name for digest in keep}
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):  # another attempt deletes too
            if file.name not in names and file.stat().st_mtime < before.timestamp():
                file.unlink()


def path(folder: Path, digest: str) -> Path:
    """Where a checkpoint lies."""
    return folder / f"{digest}.safetensors"
