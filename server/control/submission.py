"""A run that comes in from outside: checked, laid out as a folder at once, and entered in the queue.

What is sent decides the run's id, the client's request id included: the same request sent again, after a
connection that broke, is the same run.
"""

import hashlib
import json
import os
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from server.daemon.settings import Settings
from server.history.records import Run
from server.history.store import History
from server.job import CHECKPOINTS, RUN_FILE, TEST_FILE
from shared import __version__, records, tasks
from shared.errors import ConfigError, DataError, NotFoundError
from shared.record_files import MEDIA
from shared.run_config import RunConfig, parse

SOURCE = "run.toml"  # what messages call the configuration that was sent
ID_DIGITS = 8
UNFINISHED = ".submitted-"


def submit(
    settings: Settings, history: History, *, request_id: str, config_toml: str, test_set: bytes | None, by: str
) -> Run:
    """Check a run, lay it out and enter it; the same request again gives the run that it made.

    Raises
    ------
    ConfigError, DataError
        Naming what is wrong with it, with nothing left behind.
    """
    if not request_id:
        raise ConfigError("request_id is missing: the client makes one for each run that it submits.")
    config = configuration(config_toml, settings.name)
    parts = (by, request_id, config.digest, hashlib.sha256(test_set or b"").hexdigest())
    run = f"{config.name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:ID_DIGITS]}"
    if (known := _known(history, run)) is not None:
        return known
    _lay_out(settings.runs, run, config, test_set)
    try:
        return history.create_run(
            run,
            name=config.name,
            config=config.as_dict(),
            config_digest=config.digest,
            rounds_planned=config.rounds,
            private=config.privacy.private,
            version=__version__,
            origin="daemon",
            submitted_by=by,
        )
    except ConfigError:
        if (known := _known(history, run)) is None:
            raise
        return known  # the same request, answered at the same moment


def tidy(runs: Path) -> None:
    """Remove what submissions left that were cut off before they were laid out; when nobody submits."""
    for part in runs.glob(f"{UNFINISHED}*"):
        shutil.rmtree(part, ignore_errors=True)


def _known(history: History, run: str) -> Run | None:
    try:
        found = history.run(run)
    except NotFoundError:
        return None
    return found if found.id == run else None  # and not one whose id begins so


def configuration(text: str, coordinator: str) -> RunConfig:
    """Read a run's configuration as it was sent; the coordinator's name is this one's.

    Raises
    ------
    ConfigError
        Where it is none, or names another coordinator.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{SOURCE} is not TOML: {error}.") from None
    federation = values.setdefault("federation", {})
    if isinstance(federation, dict):
        named = federation.setdefault("coordinator", coordinator)
        if named != coordinator:
            raise ConfigError(
                f"{SOURCE}: federation.coordinator={named!r} is not this coordinator's name, which is {coordinator!r}; "
                "take the setting out, or submit the run there."
            )
    return parse(RunConfig, values, source=SOURCE)


def _lay_out(runs: Path, run: str, config: RunConfig, test_set: bytes | None) -> None:
    """Put the run's folder in place whole; one that is there already is this very run's."""
    if (runs / run).is_dir():
        return
    runs.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=runs))
    try:
        (part / CHECKPOINTS).mkdir()
        if test_set is not None:
            _write(part / TEST_FILE, test_set)
            _check(part / TEST_FILE, config)
        described: dict[str, Any] = {"run": run, "sites": 0, "config": config.as_dict(), "supervised": True}
        _write(part / RUN_FILE, json.dumps(described, indent=1).encode())
        try:
            part.rename(runs / run)
        except OSError:
            if not (runs / run).is_dir():
                raise
        _sync(runs)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    _sync(file)


def _sync(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check(file: Path, config: RunConfig) -> None:
    task = tasks.of(config)
    if any(column.kind in MEDIA for column in task.columns.values()):
        raise ConfigError(
            f"task.name={config.task.name!r} has its records in files of their own, which a submission does not carry; submit "
            "the run without a test set: the sites' scores are released all the same."
        )
    try:
        records.read(file, task, identified=False)
    except DataError as error:
        raise DataError(str(error).replace(str(file), TEST_FILE)) from None
