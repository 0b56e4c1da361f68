"""An exported model on its way out: written by a process of its own, then sent as a tar with a digest at the end.

The process of its own keeps torch and the model out of the daemon, whose memory shall not grow with them.

    python -m server.control.exporting RUN FOLDER FORM ROUND OUT      with the history's URL in MOONFLOWER_DATABASE
"""

import asyncio
import hashlib
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from shared.errors import ConfigError, DatabaseError, MoonflowerError, NotFoundError
from shared.processes import LAUNCHER

Form = Literal["adapter", "merged"]
FORMS = get_args(Form)
UNFINISHED = ".export-"
COMMAND = (sys.executable, "-m", "server.control.exporting")
CHUNK = 1 << 20  # bytes of a message


@dataclass(frozen=True)
class Asked:
    """What shall be exported."""

    run: str
    folder: Path  # the run's
    form: str  # adapter or merged
    round: int  # 0: the last committed one


async def tar(asked: Asked, *, database: str, scratch: Path) -> AsyncGenerator[bytes | str]:
    """Yield the bytes of a tar of the exported folder, and at last their SHA-256, hexadecimal.

    Parameters
    ----------
    database
        The history's URL.
    scratch
        Where the export is written, twice, until it is sent.

    Raises
    ------
    MoonflowerError
        What the export says is wrong with the run; RuntimeError where it failed another way.
    """
    if asked.form not in FORMS:
        raise ConfigError(f"form={asked.form!r} must be one of {', '.join(FORMS)}.")
    if asked.round < 0:
        raise ConfigError(f"round={asked.round} must be at least 1, or 0 for the last.")
    with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=scratch) as place:
        out, packed = Path(place) / "out", Path(place) / "out.tar"
        await _write(asked, out, database)
        await asyncio.to_thread(_pack, out, packed)
        digest = hashlib.sha256()
        with packed.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, CHUNK):
                digest.update(chunk)
                yield chunk
        yield digest.hexdigest()


def tidy(scratch: Path) -> None:
    """Remove what exports left that were cut off with their daemon; when nobody exports."""
    for left in scratch.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


async def _write(asked: Asked, out: Path, database: str) -> None:
    alone = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(os.getpid())]  # it dies with the daemon, however that ends
    command = [*alone, *COMMAND, asked.run, str(asked.folder), asked.form, str(asked.round), str(out)]
    environment = {
        **os.environ,
        "MOONFLOWER_DATABASE": database,
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
    }
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(*command, env=environment, stdout=pipe, stderr=pipe)
    try:
        said, complaint = await child.communicate()
    finally:
        if child.returncode is None:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    if child.returncode == 0:
        return
    try:
        fault = json.loads(said.decode().splitlines()[-1])
    except (ValueError, IndexError):
        raise RuntimeError(f"the export ended with code {child.returncode}: {complaint.decode()[-4000:]}") from None
    kinds: dict[str, type[MoonflowerError]] = {kind.__name__: kind for kind in (NotFoundError, DatabaseError)}
    raise kinds.get(fault["kind"], ConfigError)(fault["text"])


def _pack(folder: Path, packed: Path) -> None:
    with tarfile.open(packed, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.add(path, str(path.relative_to(folder)), recursive=False)


def main(run: str, folder: str, form: Form, round: str, out: str) -> int:
    """Write the export; what a person must read goes to standard output as JSON."""
    from server.export.folder import write  # torch comes with it
    from server.history.store import History

    try:
        with History.open(os.environ["MOONFLOWER_DATABASE"], create=False) as history:
            write(history, run, Path(folder), Path(out), form, chosen=int(round) or "last")
    except MoonflowerError as error:
        print(json.dumps({"kind": type(error).__name__, "text": str(error)}))  # noqa: T201 - to the daemon
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))  # type: ignore[arg-type]  # its parent has checked the form
