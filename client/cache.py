"""A site's encoded records on its disk: made once, found again by what they were made of, and mapped into memory.

They are as private as the records are. The folder is the site's own (0700), beside the ledger; only arrays are in it, and a
list of their digests, by which a damaged entry is known and made anew. A data set has a few entries, of what its files hold
now; older ones are removed.
"""

import json
import logging
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from client.digests import Digests
from shared.errors import DataError

log = logging.getLogger("moonflower.site")

KEPT = 3  # entries of one data set: as many runs of it can take turns
LIST = "entry.json"
ENTRY = re.compile(r"[0-9a-f]{32}-[0-9a-f]{32}")  # the name of an entry: of its content, and of what it was made of
FRESH = ".new-"  # how the name of an entry begins that is being made
ABANDONED = 86_400  # seconds after which nobody goes on with one


class Cache:
    """The entries of one data set.

    Raises
    ------
    DataError
        Where the folder cannot be made or written, or others may read it.
    """

    def __init__(self, folder: Path, dataset: str) -> None:
        self._folder = folder / dataset
        try:
            for made in (folder, self._folder):
                made.mkdir(mode=0o700, parents=True, exist_ok=True)
                held = made.stat()
                if stat.S_IMODE(held.st_mode) & 0o077 or held.st_uid != os.geteuid():
                    raise DataError(
                        f"cache={str(made)!r} is not this user's alone, and encoded records are to lie there; chmod 700 it, or "
                        "name another folder (site.toml, cache)."
                    )
        except OSError as error:
            raise DataError(f"cache={str(folder)!r} cannot be used: {error.strerror} (site.toml, cache).") from None

    def get(self, content: str, made_of: str, digests: Digests, make: Callable[[Path], set[Path]]) -> Path:
        """Return the folder of an entry; where there is none that is whole, `make` writes it.

        Parameters
        ----------
        content, made_of
            Digests of the data set's files, and of all else that decides what is encoded.
        make
            Fills an empty folder, and returns the files that the records name besides those of `content`.
        """
        entry = self._folder / f"{content[:32]}-{made_of[:32]}"
        if entry.is_dir():
            if _is_whole(entry, digests):
                with suppress(OSError):  # another process may just have replaced it
                    os.utime(entry)
                return entry
            log.info("what was kept of the encoded records is damaged, or of other files; it is made anew")
        try:
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=FRESH, ignore_cleanup_errors=True) as place:
                fresh = Path(place)
                references = digests.each(make(fresh))
                held = {file.relative_to(fresh).as_posix(): digest for file, digest in _files(fresh).items()}
                (fresh / LIST).write_text(json.dumps({"files": held, "references": references}), encoding="utf-8")
                shutil.rmtree(entry, ignore_errors=True)
                try:
                    fresh.rename(entry)
                except OSError:
                    if not entry.is_dir():  # it is, where another process was quicker
                        raise
        except OSError as error:
            raise DataError(f"cache={str(self._folder)!r} cannot be written: {error.strerror}.") from None
        self._tidy(content)
        return entry

    def _tidy(self, content: str) -> None:
        """Remove entries of what the files held before, all but the latest, and what a dead process began."""
        for begun in self._folder.glob(f"{FRESH}*"):
            with suppress(FileNotFoundError):
                if time.time() - begun.stat().st_mtime > ABANDONED:
                    shutil.rmtree(begun, ignore_errors=True)
        entries = [
            entry for entry in self._folder.iterdir() if ENTRY.fullmatch(entry.name)
        ]  # and nobody else's folders
        current = [entry for entry in entries if entry.name.startswith(f"{content[:32]}-")]
        newest = sorted(current, key=lambda entry: entry.stat().st_mtime, reverse=True)[:KEPT]
        for entry in entries:
            if entry not in newest:
                shutil.rmtree(entry, ignore_errors=True)


def references(entry: Path) -> Mapping[str, str]:
    """Return the digests of the files that an entry's records name."""
    held: dict[str, str] = json.loads((entry / LIST).read_text(encoding="utf-8"))["references"]
    return held


def _files(folder: Path) -> dict[Path, str]:
    digests = Digests()
    return {file: digests.of(file) for file in sorted(folder.rglob("*.npy"))}


def _is_whole(entry: Path, digests: Digests) -> bool:
    try:
        said = json.loads((entry / LIST).read_text(encoding="utf-8"))
        found = {file.relative_to(entry).as_posix(): digest for file, digest in _files(entry).items()}
        return bool(said["files"] == found and digests.each(map(Path, said["references"])) == said["references"])
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return False
