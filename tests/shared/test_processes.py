import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shared.processes import Child, Supervised, alive, family, kill

TWO_SESSIONS = ["bash", "-c", "setsid sleep 61 & echo ready; exec sleep 60"]  # its child has a session of its own


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)


def test_lines_of_a_child_and_of_its_errors_are_passed_on():
    lines: list[str] = []
    child = Child("talker", ["bash", "-c", "echo out; echo err >&2; printf tail"], on_line=lines.append)
    wait_for(lambda: child.poll() is not None)
    child.stop(0)
    assert lines == ["out", "err", "tail"]


def test_a_command_that_does_not_exist_is_an_exit_code_and_a_line():
    lines: list[str] = []
    child = Child("none", ["no-such-command"], on_line=lines.append)
    wait_for(lambda: child.poll() is not None)
    assert child.stop(0) == 127
    assert lines == ["no-such-command cannot be started: No such file or directory"]


def test_stopping_ends_the_whole_family_also_those_with_a_session_of_their_own():
    lines: list[str] = []
    child = Child("parent", TWO_SESSIONS, on_line=lines.append)
    wait_for(lambda: lines == ["ready"] and len(family(child.mark)) == 2)
    started = time.monotonic()
    assert child.stop(5) == -signal.SIGTERM
    assert time.monotonic() - started < 2
    assert family(child.mark) == []


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace():
    lines: list[str] = []
    child = Child(
        "stubborn", ["bash", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"], on_line=lines.append
    )
    wait_for(lambda: lines == ["ready"])
    started = time.monotonic()
    assert child.stop(0.3) == -signal.SIGKILL
    assert 0.3 <= time.monotonic() - started < 2


def test_a_supervised_command_is_started_again_later_each_time():
    lines: list[str] = []
    supervised = Supervised(
        "failing", lambda: ["bash", "-c", "echo $$; exit 3"], backoff=(0.1, 0.2), on_line=lines.append
    )
    supervised.start()
    pauses = []
    while len(pauses) < 3:
        if (code := supervised.poll()) is not None:
            assert code == 3
            assert supervised.pid is None
            assert supervised.restart_at is not None
            pauses.append(supervised.restart_at - time.monotonic())
        time.sleep(0.005)
    supervised.stop(0)
    assert pauses == pytest.approx([0.1, 0.2, 0.2], abs=0.05)
    assert len(set(lines)) == 3
    time.sleep(0.3)
    assert supervised.poll() is None
    assert supervised.pid is None


def test_what_a_killed_child_left_running_is_ended_before_it_starts_again():
    lines: list[str] = []
    supervised = Supervised("parent", lambda: TWO_SESSIONS, backoff=(5, 5), on_line=lines.append)
    supervised.start()
    wait_for(lambda: lines == ["ready"] and len(family(supervised.mark)) == 2)
    assert supervised.pid is not None
    os.kill(supervised.pid, signal.SIGKILL)
    wait_for(lambda: supervised.poll() == -signal.SIGKILL)
    assert family(supervised.mark) == []
    supervised.stop(0)


def test_a_child_dies_with_its_parent_and_what_it_left_is_found_by_its_mark(tmp_path: Path):
    mark = f"test {tmp_path}"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time; from shared.processes import Child\n"
            f"Child('c', {TWO_SESSIONS!r}, on_line=lambda line: print(line, flush=True), mark=sys.argv[1] + '#c')\n"
            "time.sleep(60)",
            mark,
        ],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    asleep = lambda: [each for each in family(mark) if each.cmdline() == ["sleep", "60"]]  # noqa: E731
    wait_for(lambda: len(family(mark)) == 2 and bool(asleep()))  # it has become its command
    child = asleep()[0]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(lambda: not alive(child), 2)
    (left,) = family(mark)  # what the child had started in a session of its own
    assert family(mark[:-1]) == []  # another family, whose name begins alike
    kill([left])
    assert not alive(left)


def test_killing_who_has_ended_already_is_no_error():
    process = subprocess.Popen(["true"])
    gone = psutil.Process(process.pid)
    process.wait()
    kill([gone])


def test_a_process_that_wrote_over_its_environment_is_still_of_the_family():
    """Ray's agents do: their titles take the room of the first variables."""
    overwrite = (
        "import ctypes, time; libc = ctypes.CDLL(None); "
        "first = ctypes.cast(ctypes.c_void_p.in_dll(libc, 'environ'), ctypes.POINTER(ctypes.c_void_p))[0]; "
        "ctypes.memset(first, 0, 60); print('done', flush=True); time.sleep(60)"
    )
    said = []
    environment = {"AAA": "x" * 100} | dict(os.environ)
    child = Child("title", [sys.executable, "-c", overwrite], environment, on_line=said.append)
    try:
        wait_for(lambda: said)
        assert said == ["done"]
        assert [process.pid for process in family(child.mark)] == [child.pid]
    finally:
        child.stop(0)
