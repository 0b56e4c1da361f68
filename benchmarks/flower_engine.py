"""Flower's Ray simulation engine, as its users start it: a SuperLink for simulations, and `flwr run`."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent
PATIENCE = 1800.0  # seconds, for a whole run


def play(
    app: Path, folder: Path, settings: dict[str, str | int], times: Path, ends: int, *, sites: int, cores: int = 1
) -> None:
    """Run an app on `sites` virtual nodes, `cores` a client, until `times` has `ends` lines; then stop everything.

    Raises
    ------
    RuntimeError
        With the end of the log, where it fails or takes too long.
    """
    folder.mkdir(parents=True)
    port = _free_port()
    home = folder / "flower"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.bench]\naddress = "127.0.0.1:{port}"\ninsecure = true\n', encoding="utf-8"
    )
    environment = {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE / 'peers'}{os.pathsep}{HERE.parent}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with (folder / "log").open("wb") as log:

        def start(*command: str) -> subprocess.Popen[bytes]:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)

        link = ["flower-superlink", "--simulation", "--insecure", "--disable-runtime-dependency-installation"]
        superlink = start(*link, "--host", "127.0.0.1", "--port", str(port))
        try:
            _wait_for_port(port)
            values = " ".join(
                f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in settings.items()
            )
            resources = f"num-supernodes={sites} client-resources-num-cpus={cores}"
            run = ["flwr", "run", str(app), "bench", "--run-config", values, "--federation-config", resources]
            done = start(*run).wait(120)
            until = time.monotonic() + PATIENCE
            while not times.exists() or len(times.read_text().splitlines()) < ends:
                if done or superlink.poll() is not None or time.monotonic() > until:
                    raise RuntimeError((folder / "log").read_text(errors="replace")[-4000:])
                time.sleep(0.5)
        finally:
            stop(superlink)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, Ray's among them."""
    try:
        root = psutil.Process(process.pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        try:
            member.terminate()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(family, timeout=15)
    for member in alive:
        member.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for_port(port: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("the SuperLink does not answer")
