"""Spoken digits (fsdd): six speakers, a site each, who say the words "zero" to "nine"."""

import csv
import hashlib
import json
import zipfile
from pathlib import Path

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def layout(data: Path, out: Path) -> None:
    """Write SPEAKER.jsonl, test.jsonl, and the recordings that they name."""
    with zipfile.ZipFile(data / "fsdd" / "recordings.zip") as held:
        held.extractall(out / "recordings")
    rows: dict[str, list[dict[str, str]]] = {}
    with (data / "fsdd" / "index.tsv").open(encoding="utf-8", newline="") as index:
        for row in csv.DictReader(index, delimiter="\t"):
            to = row["speaker"] if row["split"] == "train" else "test"
            record = {"id": row["file"], "audio": f"recordings/{row['file']}", "transcript": WORDS[int(row["label"])]}
            rows.setdefault(to, []).append(record)
    rows["test"].sort(
        key=lambda record: hashlib.sha256(record["id"].encode()).digest()
    )  # any first part is like the whole
    for name, records in rows.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
