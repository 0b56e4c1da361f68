"""Spoken digits of six speakers, a site each: 150 clips for training and 50 for the test. From fsdd."""

import csv
import json
import random
import zipfile
from pathlib import Path


def layout(data: Path, out: Path) -> None:
    """Write out/SPEAKER.jsonl and out/test.jsonl, and the clips that they name."""
    folder = data / "fsdd"
    with zipfile.ZipFile(folder / "recordings.zip") as archive:
        archive.extractall(out / "clips")
    rows: dict[str, list[str]] = {}
    with (folder / "index.tsv").open(encoding="utf-8", newline="") as index:
        for clip in csv.DictReader(index, delimiter="\t"):
            row = {"id": clip["file"], "audio": f"clips/{clip['file']}", "label": clip["label"]}
            rows.setdefault(clip["speaker"] if clip["split"] == "train" else "test", []).append(json.dumps(row))
    for name, lines in rows.items():
        random.Random(0).shuffle(lines)  # noqa: S311 - which rows are scored between rounds
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
