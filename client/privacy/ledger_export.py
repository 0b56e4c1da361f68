"""An exported ledger as a file: written whole or not at all, and never over anything but an earlier export."""

import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

from shared import ledger_chain
from shared.errors import ConfigError, DataError


def text(values: Any) -> str:
    """Return JSON that any program reads: an infinite epsilon is the text "Infinity"."""
    return json.dumps(_plain(values), indent=1, allow_nan=False) + "\n"


def read(file: Path) -> Any:
    """Read what should be an export; `ledger_chain.verify` says whether it is one.

    Raises
    ------
    DataError
        Where the file cannot be read, or is no JSON.
    """
    try:
        return ledger_chain.parse(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {' '.join(str(error).split())}.") from None


def write(file: Path, values: dict[str, Any], ledger: Path) -> None:
    """Write an export of `ledger`, durably; an earlier export in the file's place is kept until this one is whole.

    Raises
    ------
    ConfigError
        Where the place is the ledger's, or holds something else than an export, or cannot be written.
    """
    place, owner = Path(os.path.realpath(file)), Path(os.path.realpath(ledger))
    rest = place.name.removeprefix(owner.name) if place.parent == owner.parent else place.name
    if rest in ("", "-wal", "-shm", "-journal") or (rest != place.name and rest.startswith(".")):
        raise ConfigError(f"--out {file} is the ledger, or a name that it keeps for itself: choose another name.")
    if os.path.lexists(place) and not _is_export(place):
        raise ConfigError(
            f"--out {file} exists and is not a ledger's export, so it is left as it is: choose another name."
        )
    draft = place.with_name(f".{place.name}.{secrets.token_hex(8)}")
    try:
        try:
            with draft.open("x", encoding="utf-8") as stream:
                stream.write(text(values))
                stream.flush()
                os.fsync(stream.fileno())
            draft.replace(place)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {file} cannot be written: {error.strerror}.") from None


def _is_export(file: Path) -> bool:
    try:
        values = read(file) if file.is_file() else None
    except DataError:
        return False
    return isinstance(values, dict) and values.get("format") == ledger_chain.FORMAT


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return "Infinity" if value == math.inf else value
