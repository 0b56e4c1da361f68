"""A run as its coordinator finds it on the disk: a folder.

run.json      the run's id, its configuration, how many sites it has, and whether a daemon supervises it
test.jsonl    the public test set; optional; a folder `test` where its records are images or clips of sound
checkpoints/  the server's state after each round
attempt.lock  held by the process that plays the run under Flower
sites/        a simulated run's sites, each with its ledger
pool/         or its many sites, with one ledger for all
"""

import json
from dataclasses import dataclass
from pathlib import Path

from shared.errors import ConfigError
from shared.run_config import RunConfig, parse

RUN_FILE, CHECKPOINTS, SITES, POOL, LOCK = "run.json", "checkpoints", "sites", "pool", "attempt.lock"
TEST_FILE, TEST_FOLDER = "test.jsonl", "test"


@dataclass(frozen=True)
class Job:
    """What a coordinator needs to know of a run."""

    run: str
    config: RunConfig
    checkpoints: Path
    test_set: Path | None  # public test records: JSON lines, or a folder of images or clips
    sites: int = 0  # how many there are, where it is known: they are waited for, beyond federation.min_sites
    device: str = "auto"
    simulated: bool = False  # its sites lie in its own folder, ledgers and all
    study: bool = (
        False  # simulated, and its sites are many: they keep their accounts in one ledger, which proves nothing
    )
    supervised: bool = False  # a daemon plays it: an attempt that the machine ends is followed by the next


def load(folder: Path) -> Job:
    """Read a run's folder.

    Raises
    ------
    ConfigError
        Where it is not one.
    """
    try:
        values = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        run, config_values = values["run"], values["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"run={str(folder)!r} is not the folder of a run; make one with `moonflower simulate --prepare` and pass its "
            "path, as in: flwr run . --run-config 'run=\"PATH\"'."
        ) from None
    config = parse(RunConfig, config_values, source=str(folder / RUN_FILE))
    test_set = next((place for name in (TEST_FILE, TEST_FOLDER) if (place := folder / name).exists()), None)
    return Job(
        run,
        config,
        folder / CHECKPOINTS,
        test_set,
        sites=int(values.get("sites", 0)),
        device=str(values.get("device", "auto")),
        simulated=(folder / SITES).is_dir() or (folder / POOL).is_dir(),
        study=(folder / POOL).is_dir(),
        supervised=bool(values.get("supervised", False)),
    )
