"""Sees to it that a simulation's processes leave nothing behind, however the command that started them ends.

    python -m simulations.reaper MARK FOLDER      waits for the end of standard input, then ends the family MARK and removes FOLDER

The command holds the other end of the pipe, which closes with it. Ray's agents live on for half a minute without their
parent, and nothing but their mark tells whose they are.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.processes import family, kill


@contextmanager
def reaping(mark: str, folder: Path) -> Iterator[None]:
    """At the end of the block, and at this process's own, end the family `mark` and remove `folder`."""
    command = [sys.executable, "-m", "simulations.reaper", mark, str(folder)]
    # A session of its own: Ctrl-C in a terminal is for the command.
    reaper = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)  # noqa: S603 - our own module
    try:
        yield
    finally:
        reaper.communicate()


def main() -> None:
    """Wait, and clear up."""
    mark, folder = sys.argv[1:]
    sys.stdin.buffer.read()
    while left := family(mark):
        kill(left)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
