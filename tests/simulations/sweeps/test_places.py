"""How many runs go at once, by what the machine has to give."""

import os
from pathlib import Path

import pytest

from simulations.sweeps import places

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine: a container's limits as the kernel shows them, and NVIDIA's program with a line a GPU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(places, "CGROUP", tmp_path)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(*, cpu=None, memory=None, used=0, gpus=None):
        for name, text in (("cpu.max", cpu), ("memory.max", memory), ("memory.current", used)):
            if text is not None:
                (tmp_path / name).write_text(f"{text}\n")
        if gpus is not None:
            lines = "".join(f"echo {free}\n" for free in gpus)
            (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}")
            (folder / "nvidia-smi").chmod(0o755)

    return make


def test_cores_are_the_processs_own_and_the_containers_share_of_them(machine):
    machine()
    own = len(os.sched_getaffinity(0))
    assert places.cores() == own
    machine(cpu="max 100000")
    assert places.cores() == own
    machine(cpu="150000 100000")
    assert places.cores() == 1
    machine(cpu="50000 100000")
    assert places.cores() == 1


def test_memory_is_what_is_free_in_the_container_too(machine):
    machine()
    assert 0 < places.memory() < 2**50
    machine(memory=5 * GIB, used=4 * GIB)
    assert places.memory() == min(GIB, places.memory())
    machine(memory="max")
    assert places.memory() > 0


def test_runs_at_once_are_as_asked_or_by_cores_and_memory_and_never_more_than_there_are(machine):
    machine(memory=4 * GIB)
    assert places.jobs(10, "cpu") == 1
    assert places.jobs(10, "cpu", 4) == 4
    assert places.jobs(3, "cpu", 4) == 3
    assert places.jobs(0, "cpu", 4) == 1
    machine(memory=0)
    assert places.jobs(10, "cpu") == 1


def test_gpus_bound_the_runs_at_once_and_are_those_that_may_be_used(machine, monkeypatch):
    machine(gpus=[24000, 8000, 80000])
    assert {number: free // 2**20 for number, free in places.gpus("auto").items()} == {0: 24000, 1: 8000, 2: 80000}
    assert list(places.gpus("cuda:1")) == [1]
    assert places.gpus("cpu") == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert list(places.gpus("auto")) == [2, 0]
    assert list(places.gpus("cuda:1")) == [0]  # as CUDA counts them
    machine(gpus=[3500])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert places.jobs(10, "auto") == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert places.gpus("auto") == {}


def test_without_nvidias_program_or_where_it_fails_there_is_no_gpu(machine, tmp_path):
    machine()
    assert places.gpus("auto") == {}
    machine(gpus=[])
    with (Path(tmp_path) / "bin" / "nvidia-smi").open("a") as stream:
        stream.write("echo 'Failed to initialize NVML' && exit 9\n")
    assert places.gpus("auto") == {}
