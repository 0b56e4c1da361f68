import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import ConfigError
from shared.locks import hold, holder

HOLDER = """
import sys, time
from pathlib import Path
from shared.locks import hold
with hold(Path(sys.argv[1]), "the state"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path: Path):
    """Give a process that holds the lock."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "lock"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_holder_is_refused_in_one_line_that_names_the_first(tmp_path: Path, other):
    with pytest.raises(ConfigError) as refused, hold(tmp_path / "lock", "the state folder /srv/x"):
        pass
    assert str(refused.value).startswith(f"the state folder /srv/x is in use by process {other.pid}; ")
    assert "\n" not in str(refused.value)


def test_a_lock_names_its_holder_and_ends_with_it_however_it_ends(tmp_path: Path, other):
    assert holder(tmp_path / "lock") == other.pid
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert holder(tmp_path / "lock") is None
    with hold(tmp_path / "lock", "the state"):
        assert holder(tmp_path / "lock") == os.getpid()
    assert holder(tmp_path / "lock") is None


def test_nobody_holds_a_file_that_is_not_there(tmp_path: Path):
    assert holder(tmp_path / "none") is None


def test_a_lock_in_a_folder_that_is_missing_is_refused_in_one_line(tmp_path: Path):
    with (
        pytest.raises(ConfigError, match=r"the state cannot be locked: .*No such file"),
        hold(tmp_path / "a" / "b", "the state"),
    ):
        pass


def test_a_child_does_not_inherit_the_lock(tmp_path: Path):
    with hold(tmp_path / "lock", "the state"):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        assert holder(tmp_path / "lock") is None
    finally:
        child.kill()
        child.wait()
