"""Runs over a pool of made-up sentences, many sites of them, and sites whose random numbers are fixed."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from flwr.clientapp import ClientApp

from client.privacy.randomness import Keystream
from server.history.store import History
from simulations import nodes, prepare
from simulations.scenario import Scenario

SITES = 12


def keyed(name: str) -> Keystream:
    """Random numbers of a request, the same in every run."""
    return Keystream(hashlib.sha256(name.partition("/")[2].encode()).digest())


def keyed_sites() -> ClientApp:
    """What a worker answers by."""
    return nodes.build(keyed)


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Made-up sentences with their labels; four to a person."""
    draw = random.Random(seed)  # noqa: S311 - made-up data
    told = {"positive": ["good", "great", "fine"], "negative": ["bad", "awful", "poor"]}
    found = []
    for number in range(count):
        label = draw.choice(list(told))
        words = [draw.choice(["the", "film", "was", "so", "a", "book"]) for _ in range(draw.randrange(1, 8))]
        text = " ".join([*words, draw.choice(told[label])])
        found.append({"id": f"{seed}-{number}", "text": text, "label": label, "who": f"p{number // 4}"})
    return found


def lay_out(folder: Path, model: Path, records: int = 360, **settings: dict[str, Any]) -> str:
    """Write a pool, and prepare a run over it in MOONFLOWER_HOME; give the run's id. Its history is `history_of(folder)`."""
    for name, count, seed in (("pool", records, 1), ("test", 40, 2)):
        text = "".join(json.dumps(row) + "\n" for row in rows(count, seed))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    values: dict[str, Any] = {
        "name": "many",
        "model": {"name": str(model), "lora": {"rank": 2, "alpha": 2}},
        "task": {"name": "text-classification", "labels": ["negative", "positive"], "max_length": 16},
        "data": {"source": "folder", "folder": str(folder), "validation": 0.3},
        "partition": {"kind": "iid", "sites": SITES},
        "warm_start": {"rounds": 1, "sampling_rate": 0.5, "clipping_norm": 1.0},
        "training": {"rounds": 2, "sampling_rate": 0.5, "clipping_norm": 0.5},
        "privacy": {"delta": 1e-3, "max_noise_multiplier": 1000.0},
        "policy": {"delta": 1e-2, "max_epsilon": 50.0},
    }
    for section, changes in settings.items():
        values[section] = {**values.get(section, {}), **changes}
    with History.open(history_of(folder)) as history:
        return prepare.prepare(Scenario.model_validate(values), history)


def history_of(folder: Path) -> str:
    """Where the history of a folder's runs is."""
    return f"sqlite:///{folder / 'history.db'}"
