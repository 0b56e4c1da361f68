"""Questions to a bank, by 77 intents, at four sites of 2,500; the whole test part. From banking77."""

import json
import random
import tomllib
from pathlib import Path
from typing import Any

SCENARIO = Path(__file__).parents[2] / "simulations" / "scenarios" / "text-classification.toml"

SITES = ("north", "east", "south", "west")
EACH = 2500  # records of a site


def layout(data: Path, out: Path) -> None:
    """Write out/SITE.jsonl and out/test.jsonl."""
    labels = tomllib.loads(SCENARIO.read_text(encoding="utf-8"))["task"]["labels"]  # the file has their numbers
    rows = {part: _rows(data / "banking77" / f"{part}.jsonl") for part in ("train", "test")}
    held = {site: rows["train"][number * EACH : (number + 1) * EACH] for number, site in enumerate(SITES)}
    for name, own in (held | {"test": rows["test"]}).items():
        lines = (
            json.dumps({"id": f"{name}/{number}", "text": row["text"], "label": labels[row["label"]]}) + "\n"
            for number, row in enumerate(own)
        )
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)  # noqa: S311 - the file is sorted by label
    return rows
