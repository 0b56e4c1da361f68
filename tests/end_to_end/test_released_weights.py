"""Weights of labels in a whole run: made of what sites have released, sent with later requests, the same after a resume."""

import json
from pathlib import Path

import numpy as np
from click.testing import CliRunner

from server import weighing
from server.history.store import History
from server.job import load
from shared import imbalance
from shared.paths import home
from simulations.cli import simulate


def test_a_run_with_released_weights_records_what_they_rest_on(tiny_scenario: Path, moonflower_home: Path) -> None:
    database = f"sqlite:///{moonflower_home.parent / 'history.db'}"
    arguments = [str(tiny_scenario), "--set", "loss.class_weights=released", "--device", "cpu"]
    done = CliRunner().invoke(simulate, [*arguments, "--format", "json", "--database", database])
    assert done.exit_code == 0, done.output
    run = json.loads(done.stdout)["run"]
    job = load(home() / "runs" / run)
    assert job.device == "cpu"
    with History.open(database) as history:
        names = {metric.name for number, metric in history.metrics(run) if number == 2}
        assert {"threshold/positive", "held/negative", "held/positive", "held/"} <= names
        sent = weighing.weights(job.config, history, run)
    assert imbalance.fault(sent, job.config) is None
    assert np.allclose(sent["labels"], 1.0, atol=0.5)  # as many of each
