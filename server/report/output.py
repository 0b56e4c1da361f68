"""Where a page is written: looked at before any work, and put in place whole."""

import os
from pathlib import Path

from shared.errors import MoonflowerError


class ReportError(MoonflowerError):
    """The report cannot be written where it was asked for."""

    exit_code = 2


def check(out: Path) -> None:
    """Refuse a place that cannot take the report.

    Raises
    ------
    ReportError
        Its folder is missing, or it is a folder or another thing that is not a file.
    """
    if not out.parent.is_dir():
        raise ReportError(f"--out {out}: there is no folder {out.parent}; make it, or write elsewhere.")
    if out.exists() and not out.is_file():
        raise ReportError(
            f"--out {out} is not a file; name the file to write, such as {out / 'report.html' if out.is_dir() else 'report.html'}."
        )
    if not os.access(out.parent, os.W_OK):
        raise ReportError(f"--out {out}: the folder {out.parent} cannot be written to; write elsewhere.")


def write(out: Path, page: str) -> None:
    """Put the page in place whole, or not at all; what was there before stays until then.

    Raises
    ------
    ReportError
        The file cannot be written.
    """
    check(out)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        with part.open("x", encoding="utf-8") as file:
            file.write(page)
        part.replace(out)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ReportError(
            f"--out {out} cannot be written: {error.strerror or error}; free it, or write elsewhere."
        ) from error
