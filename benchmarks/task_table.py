"""Each task on a real model and real records, under privacy: its scores before and after, and its time.

    python benchmarks/task_table.py --data DATA --models MODELS              every task
    python benchmarks/task_table.py --data DATA --models MODELS --only causal-lm

DATA holds the data sets that `benchmarks/task_scenarios/` lays out, one module a scenario, each of which says which
files it reads. MODELS holds pretrained models as folders of the names in MODEL below. A scenario whose data or model are
missing is said to be, and left out. The scenarios are `simulations/scenarios/TASK.toml`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

MODEL = {  # scenario -> the model's folder; others are minilm
    "causal-lm": "smollm2",
    "seq2seq": "tiny-t5",
    "speech-to-text": "whisper",
    "audio-classification": "whisper",
    "image-classification": "dinov2",
}
HERE = Path(__file__).parent
SHOWN = 3  # scores


def scenarios() -> list[str]:
    """Give the names of the scenarios that have a layout."""
    return sorted(file.stem.replace("_", "-") for file in (HERE / "task_scenarios").glob("[a-z]*.py"))


def run(name: str, data: Path, model: Path, epsilon: str | None) -> dict[str, Any]:
    """Lay a scenario out and play it in a process of its own; give its scores before and after, and seconds."""
    with tempfile.TemporaryDirectory() as home:
        out = Path(home) / "data"
        out.mkdir()
        import_module(f"task_scenarios.{name.replace('-', '_')}").layout(data, out)
        settings = {"data.folder": str(out), "model.name": str(model)}
        if epsilon is not None:
            settings["privacy.epsilon"] = epsilon
        given = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        environment = os.environ | {"MOONFLOWER_HOME": str(Path(home) / "home")}
        environment.pop("MOONFLOWER_DATABASE", None)
        command = [
            sys.executable,
            "-c",
            "from shared.cli import main; main()",
            "simulate",
            name,
            *given,
            "--format",
            "json",
        ]
        started = time.monotonic()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.monotonic() - started
        after = json.loads(done.stdout)
        return {"before": before(after["run"], Path(home) / "home"), "after": after, "seconds": seconds}


def before(run: str, home: Path) -> dict[str, float]:
    """Score what a run began with, on its public test set."""
    from server import job
    from server.evaluation import TestSet
    from shared import models

    held = job.load(home / "runs" / run)
    if held.test_set is None:
        return {}
    model = models.load(held.config)
    return {
        metric.name: metric.value
        for metric in TestSet(held.test_set, held.config, model).score(model.arrays(), whole=True)
    }


def row(name: str, found: dict[str, Any]) -> str:
    """Write a line of the table."""
    from shared.score_names import telling, title

    scores = [*[each for each in telling(found["after"]["test"]) if each != "loss"][:SHOWN], "loss"]
    said = [
        f"{title(each)} {found['before'].get(each, float('nan')):.3f} → {found['after']['test'][each]:.3f}"
        for each in scores
        if each in found["after"]["test"]
    ]
    spent = max(float(value) for value in found["after"]["epsilon"].values())
    return f"| {name} | {MODEL.get(name, 'minilm')} | {found['after']['rounds']} | {spent:.2f} | {'; '.join(said)} | {found['seconds']:.0f} s |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=scenarios())
    parser.add_argument("--epsilon", help="instead of the scenarios' own; inf is without privacy")
    asked = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}\n"
    )
    print("| scenario | model | rounds | epsilon spent | test scores, before → after | time |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in asked.only or scenarios():
        model = asked.models / MODEL.get(name, "minilm")
        try:
            if not model.is_dir():
                raise FileNotFoundError(f"{model} is no folder")
            line = row(name, run(name, asked.data, model, asked.epsilon))
        except (OSError, subprocess.CalledProcessError) as error:
            line = f"| {name} | not run: {error} | | | | |"
        print(line, flush=True)


if __name__ == "__main__":
    main()
