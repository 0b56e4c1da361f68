"""Checkpoints: whole or absent whatever dies, checked when read, and pruned with care."""

import os
import resource
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from server import checkpoints
from server.optimization import ServerState, enter, start
from shared.errors import MachineError, NotFoundError, RunFailedError
from shared.packages import file_digest

PAST, FUTURE = datetime(2000, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=1)


def state(seed=0, size=1000) -> ServerState:
    array = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    return enter(start({"head.weight": array, "head.bias": array[:3]}, "ba5e"), "training", ("head.bias",))


def test_a_checkpoint_is_named_by_the_digest_of_its_file(tmp_path):
    written = checkpoints.write(tmp_path / "new" / "folder", state())
    file = checkpoints.path(tmp_path / "new" / "folder", written.digest)
    assert file_digest(file) == written.digest == file.stem
    assert file.stat().st_size == written.bytes
    assert [item.name for item in file.parent.iterdir()] == [file.name]


def test_equal_states_have_equal_digests_in_every_process(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; from server import checkpoints; "
        "from server.optimization import enter, start; "
        "a = np.arange(12, dtype=np.float32); "
        "s = enter(start({'b': a, 'a': a[:2]}), 'refit', ('a',)); "
        "print(checkpoints.write(Path(sys.argv[1]), s).digest)"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    array = np.arange(12, dtype=np.float32)
    # The order of the names does not matter either.
    here = checkpoints.write(tmp_path, enter(start({"a": array[:2], "b": array}), "refit", ("a",)))
    assert digests == {here.digest + "\n"}


def test_a_write_that_is_killed_leaves_a_whole_file_or_none(tmp_path):
    code = (
        "import sys, numpy as np; from pathlib import Path; from server import checkpoints; "
        "from server.optimization import start; folder = Path(sys.argv[1])\n"
        "for seed in range(10_000):\n"
        "    arrays = {'a': np.random.default_rng(seed).normal(size=700_000).astype(np.float32)}\n"
        "    print(checkpoints.write(folder, start(arrays)).digest, flush=True)"
    )
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        reported = [writer.stdout.readline().strip()]  # it is under way
        until = time.monotonic() + 20
        while not list(tmp_path.glob(".writing-*")):
            assert time.monotonic() < until
        writer.send_signal(signal.SIGKILL)
        reported += [line.strip() for line in writer.stdout if len(line) == 65]
        writer.wait()
        writer.stdout.close()
        for file in tmp_path.glob("*.safetensors"):
            assert file_digest(file) == file.stem
        for digest in reported:
            checkpoints.read(tmp_path, digest)
        checkpoints.prune(tmp_path, {reported[0]}, before=FUTURE)
        assert [file.stem for file in tmp_path.iterdir()] == [reported[0]]


def test_a_missing_or_damaged_checkpoint_is_one_clear_line(tmp_path):
    written = checkpoints.write(tmp_path, state())
    file = checkpoints.path(tmp_path, written.digest)
    whole = file.read_bytes()
    spoilt = bytearray(whole)
    spoilt[-1] ^= 1
    for content in (bytes(spoilt), whole[:-100], b""):
        file.write_bytes(content)
        with pytest.raises(NotFoundError, match=r"^checkpoint .* is damaged: .*restore it from a backup\.$"):
            checkpoints.read(tmp_path, written.digest)
    file.unlink()
    with pytest.raises(NotFoundError, match=r"^checkpoint .* is missing; restore it from a backup"):
        checkpoints.read(tmp_path, written.digest)


def test_a_file_that_is_whole_but_no_checkpoint_is_one_clear_line(tmp_path):
    (tmp_path / "x").write_bytes(b"not safetensors at all")
    digest = file_digest(tmp_path / "x")
    (tmp_path / "x").rename(checkpoints.path(tmp_path, digest))
    with pytest.raises(NotFoundError, match="cannot be read"):
        checkpoints.read(tmp_path, digest)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailedError, match=r"cannot be written to .*: .+; mend that, then resume the run\."):
        checkpoints.write(tmp_path / "file" / "folder", state())


def test_pruning_keeps_what_it_must_and_orphans_go(tmp_path):
    written = [checkpoints.write(tmp_path, state(seed)).digest for seed in range(5)]
    (tmp_path / ".writing-abc").write_bytes(b"half")
    checkpoints.prune(tmp_path, set(written[3:]), before=FUTURE)
    assert {file.name for file in tmp_path.iterdir()} == {f"{digest}.safetensors" for digest in written[3:]}
    checkpoints.read(tmp_path, written[4])


def test_pruning_leaves_what_another_attempt_has_just_written(tmp_path):
    newest = checkpoints.write(tmp_path, state(1)).digest
    (tmp_path / ".writing-abc").write_bytes(b"half")
    checkpoints.prune(tmp_path, set(), before=PAST)
    assert len(list(tmp_path.iterdir())) == 2
    checkpoints.read(tmp_path, newest)


def test_pruning_a_folder_that_is_not_there_is_no_error(tmp_path):
    checkpoints.prune(tmp_path / "none", set(), before=FUTURE)


@pytest.fixture
def small_disk():
    """Let no file of this process grow beyond 2000 bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_leaves_nothing_half_written_and_is_the_machines_fault(tmp_path, request):
    large = start({"a": np.ones(10_000, np.float32)}, "ba5e")
    first = checkpoints.write(tmp_path, large)
    checkpoints.path(tmp_path, first.digest).unlink()
    request.getfixturevalue("small_disk")
    with pytest.raises(MachineError) as raised:
        checkpoints.write(tmp_path, large)
    assert "cannot be written" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
