"""`moonflower simulate --engine flower`: what could not run is refused in one line, before anything is laid out."""

import importlib.util
import socket
import sys

import pytest

from shared.cli import main
from shared.errors import ConfigError
from simulations import cluster, flower
from simulations.cluster import Node
from simulations.flower import Resources


@pytest.fixture
def refused(moonflower_home, monkeypatch, capfd):
    """Run a simulation that must be refused in one line of code 2, with nothing laid out."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moonflower", "simulate", *(str(argument) for argument in arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert (ended.value.code, out) == (2, "")
        assert err.startswith("Error: ")
        assert len(err.splitlines()) == 1, err
        assert not (moonflower_home / "runs").exists()
        assert not (moonflower_home / "history.db").exists()
        return err

    return run


def test_without_ray_the_error_names_the_extra_that_brings_it(refused, tiny_scenario, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(flower, "find_spec", lambda name: None if name == "ray" else found(name))
    assert "pip install 'moonflower[ray]'" in refused(tiny_scenario, "--engine", "flower")


@pytest.mark.parametrize("option", [("--cpus-per-site", 1), ("--gpus-per-site", 0.5), ("--ray-address", "auto")])
def test_rays_options_without_rays_engine_are_refused(refused, tiny_scenario, option):
    assert "add it, or leave them out" in refused(tiny_scenario, *option)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--cpus-per-site", 0), "--cpus-per-site 0 is below 1"),
        (("--cpus-per-site", 100000), "above the"),
        (("--gpus-per-site", -0.5), "--gpus-per-site -0.5 is neither"),
        (("--gpus-per-site", 1.5), "--gpus-per-site 1.5 is neither"),
        (("--gpus-per-site", "nan"), "--gpus-per-site nan is neither"),
        (("--gpus-per-site", "inf"), "--gpus-per-site inf is neither"),
        (("--device", "cuda:0"), "Ray hides the GPUs"),
        (("--workers", 2), "--workers 2 is of --engine in-process"),
        (("--ray-address", "somewhere"), "neither HOST:PORT nor auto"),
        (("--ray-address", "http://127.0.0.1:80"), "neither HOST:PORT nor auto"),
        (("--ray-address", "127.0.0.1:99999"), "no Ray cluster answers there"),
    ],
)
def test_resources_that_cannot_be_had_are_refused_before_anything_is_laid_out(refused, tiny_scenario, options, said):
    assert said in refused(tiny_scenario, "--engine", "flower", *options)


def test_a_share_of_a_gpu_where_there_is_none_is_refused_with_the_remedy(refused, tiny_scenario, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    said = refused(tiny_scenario, "--engine", "flower", "--gpus-per-site", 0.25)
    assert "has no GPU" in said
    assert "--ray-address" in said


def test_a_share_of_a_gpu_that_is_there_passes(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    Resources(gpus=0.25).check("cuda:0")
    with pytest.raises(ConfigError, match="has 1 GPU that"):
        Resources(gpus=2).check("cuda:0")


def test_a_port_where_nobody_listens_is_told_at_once(refused, tiny_scenario):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        said = refused(tiny_scenario, "--engine", "flower", "--ray-address", address)
    assert "no Ray cluster answers there" in said


def node(**changed):
    kernel = cluster.KERNEL.read_text(encoding="utf-8").strip()
    values = {"address": "10.0.0.1", "host": "one", "cpus": 4.0, "gpus": 0.0, "kernel": kernel, "sees": True}
    return Node(**(values | changed))


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([node(), node(address="10.0.0.2", host="two", kernel="another")], r"10.0.0.2 \(two\) is another machine"),
        ([node(), node(address="10.0.0.2", sees=False)], "10.0.0.2 .* does not see"),
        ([node(cpus=1.0), node(cpus=1.0)], "fit on no node .*10.0.0.1: 1 CPUs, 0 GPUs"),
        ([node(), node(gpus=1.0, cpus=1.0)], "fit on no node"),
    ],
)
def test_a_cluster_that_could_not_play_the_run_is_refused(nodes, said, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "look", lambda address, folder: nodes)
    with pytest.raises(ConfigError, match=said):
        cluster.check("10.0.0.1:6379", tmp_path, cpus=2, gpus=0.5 if nodes[-1].gpus else 0.0)


def test_a_cluster_of_this_machine_with_room_for_a_site_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "look", lambda address, folder: [node(cpus=1.0), node(address="127.0.0.2", gpus=1.0)])
    cluster.check("10.0.0.1:6379", tmp_path, cpus=2, gpus=0.5)


def test_a_reason_is_the_last_error_that_is_not_flowers_own_wrapping():
    lines = [
        "Traceback (most recent call last):",
        "ValueError: first.",
        "ValueError: ActorPool is empty.",
        "RuntimeError: Simulation Runtime crashed.",
        "RuntimeError: An error was encountered. Ending simulation.",
        "Exit Code: 700",
    ]
    assert flower._reason(lines) == "ValueError: ActorPool is empty."
    assert flower._reason(["", "no error here"]) == "no error here"
