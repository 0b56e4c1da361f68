"""Worker processes: which of them answers changes no bit, and one that dies costs its own messages and no more."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pools
import psutil
import pytest
import torch

from server import job, rounds
from server.history.store import History
from server.observer import Log
from shared.messages import TrainRequest
from simulations import prepare, workers
from simulations.grid import InProcessGrid
from simulations.workers import WorkerGrid


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Have this process compute with one thread, as workers do here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextmanager
def grid_of(run: str, count: int) -> Iterator[Any]:
    nodes = prepare.nodes(run)
    local = nullcontext(InProcessGrid(pools.keyed_sites(), nodes))
    several = WorkerGrid(pools.keyed_sites, nodes, devices=[None] * count, threads=1) if count else local
    with several as grid:
        yield grid


def play(folder: Path, run: str, count: int) -> tuple[list[str], list[Any]]:
    """Play a run; give its checkpoints, and what was spent."""
    with History.open(pools.history_of(folder)) as history:
        with grid_of(run, count) as grid:
            rounds.run(job.load(prepare.run_folder(run)), grid, history, Log(), engine="in-process")
        spends = [
            (number, spend.site, spend.part, spend.epsilon, spend.noise_multiplier)
            for number, spend in history.spends(run)
        ]
        return [each.checkpoint.digest for each in history.rounds(run)], sorted(spends)


def test_any_number_of_workers_gives_the_same_bits(tmp_path: Path, tiny_model: Path, moonflower_home: Path) -> None:
    runs = {}
    for count in (0, 1, 3):
        runs[count] = play(tmp_path, pools.lay_out(tmp_path, tiny_model), count)
    assert len(set(runs[0][0])) == 3
    assert runs[0] == runs[1] == runs[3]
    assert len(runs[0][1]) == 2 * 3 * pools.SITES


def test_a_worker_that_dies_is_replaced_and_its_messages_are_answered_by_errors(
    tmp_path: Path, tiny_model: Path, moonflower_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = pools.lay_out(
        tmp_path,
        tiny_model,
        federation={"on_shortfall": "continue"},
        training={"rounds": 3, "sampling_rate": 0.5, "clipping_norm": 0.5, "local_steps": 3},
    )
    killed = threading.Event()

    class Killer(Log):
        def asked(self, number: int, kind: Any, sites: list[str]) -> None:
            if (number, kind) == (2, "train"):
                multiprocessing.active_children()[0].kill()
                killed.set()

    with caplog.at_level(logging.ERROR), History.open(pools.history_of(tmp_path)) as history:
        with grid_of(run, 2) as grid:
            done = rounds.run(job.load(prepare.run_folder(run)), grid, history, Killer(), engine="in-process")
        failed = [
            (number, part.error)
            for number, part in history.participations(run)
            if part.kind == "train" and part.outcome != "ok"
        ]
        trained = [n for n, part in history.participations(run) if part.kind == "train" and part.outcome == "ok"]
    assert killed.is_set()
    assert done.status == "completed"
    assert 1 <= len(failed) <= workers.AHEAD
    assert {number for number, _ in failed} == {2}
    assert all("WorkerDied" in str(error) for _, error in failed)
    assert trained.count(2) == pools.SITES - len(failed)
    assert trained.count(3) == trained.count(4) == pools.SITES
    assert "a worker died (exit code -9)" in caplog.text


def test_a_questions_arrays_are_mapped_as_they_are_and_nobody_writes_to_anothers(tmp_path: Path) -> None:
    arrays = {"a": np.arange(7, dtype=np.float32), "b": np.zeros((0, 3), np.float32), "c": np.ones((2, 3), np.float32)}
    request = TrainRequest("run", "{}", 4, arrays)
    with (tmp_path / "question").open("wb") as stream:
        workers._write(stream, request)
    read = workers._read(tmp_path / "question")
    assert (read.run, read.config, read.round) == ("run", "{}", 4)
    assert all(np.array_equal(read.arrays[name], arrays[name]) for name in arrays)
    read.arrays["a"][0] = 9  # in this process alone
    assert workers._read(tmp_path / "question").arrays["a"][0] == 0


SCRIPT = """
import sys
import pools
from server import job, rounds
from server.history.store import History
from server.observer import Log
from simulations import prepare
from simulations.workers import WorkerGrid

if __name__ == "__main__":
    run, database = sys.argv[1:]
    with History.open(database) as history:
        with WorkerGrid(pools.keyed_sites, prepare.nodes(run), devices=[None, None], threads=1) as grid:
            rounds.run(job.load(prepare.run_folder(run)), grid, history, Log(), engine="in-process")
"""


def test_a_run_killed_with_its_workers_goes_on_to_the_same_bits_and_spends_nothing_twice(
    tmp_path: Path, tiny_model: Path, moonflower_home: Path
) -> None:
    whole = play(tmp_path, pools.lay_out(tmp_path, tiny_model), 0)
    run = pools.lay_out(tmp_path, tiny_model)
    script = tmp_path / "play.py"
    script.write_text(SCRIPT, encoding="utf-8")
    paths = os.pathsep.join(str(Path(each).absolute()) for each in (Path(pools.__file__).parent, "."))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    database = pools.history_of(tmp_path)
    command = [sys.executable, str(script), run, database]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        with History.open(database) as history:
            until = time.monotonic() + 500  # on a busy machine torch is long in coming
            while history.run(run).rounds_done < 1 and time.monotonic() < until and process.poll() is None:
                time.sleep(0.01)
            assert history.run(run).rounds_done >= 1
        parent = psutil.Process(process.pid)
        children = parent.children(recursive=True)
        assert len(children) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    resumed = play(tmp_path, run, 2)
    assert resumed == whole
