"""Digests of a data set's files: what a process compares before it trusts what it has encoded.

A file that stands as it stood, by its times and its size, is not read again: its times were old enough when it was read
that a later change shows in them.
"""

import hashlib
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import DataError
from shared.record_files import walk

SETTLED = 2.0  # seconds after which a further change of a file shows in its times, on any file system


@dataclass
class Digests:
    """SHA-256 of files and folders, kept for as long as they stand as they are."""

    _kept: dict[Path, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def of(self, path: Path) -> str:
        """Return the digest of a file, or of a folder: of its files' names and bytes.

        Raises
        ------
        DataError
            Where it cannot be read.
        """
        if not path.is_dir():
            return self._file(path)
        found = hashlib.sha256()
        for file in walk(path):
            found.update(f"{file.relative_to(path).as_posix()}\0{self._file(file)}\n".encode(errors="surrogateescape"))
        return found.hexdigest()

    def each(self, paths: Iterable[Path]) -> dict[str, str]:
        """Return each file's digest by its path."""
        return {str(path): self._file(path) for path in sorted(paths)}

    def _file(self, path: Path) -> str:
        try:
            with path.open("rb") as stream:
                stands = os.fstat(stream.fileno())
                marks = (stands.st_dev, stands.st_ino, stands.st_size, stands.st_mtime_ns, stands.st_ctime_ns)
                known = self._kept.pop(path, None)
                if known is None or known[0] != marks:
                    known = marks, hashlib.file_digest(stream, "sha256").hexdigest()
                    if time.time() - max(stands.st_mtime, stands.st_ctime) < SETTLED:
                        return known[1]
                self._kept[path] = known
                return known[1]
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from None
