"""Speeches of Shakespeare's roles (shakespeare-roles): three sites, each with roles of its own; a document is a speech."""

import hashlib
import json
from pathlib import Path
from typing import Any

SITES = ("globe", "rose", "swan")
RECORDS, TEST = 500, 90  # of a site, and public ones


def layout(data: Path, out: Path) -> None:
    """Write SITE.jsonl and test.jsonl."""
    held: dict[str, list[dict[str, str]]] = {site: [] for site in SITES}
    for number, row in enumerate(_rows(data / "shakespeare-roles" / "train.jsonl")):
        site = SITES[int(hashlib.sha256(row["role"].encode()).hexdigest(), 16) % len(SITES)]
        if len(held[site]) < RECORDS:
            held[site].append({"id": str(number), "text": row["text"]})
    for site, records in held.items():
        _write(out / f"{site}.jsonl", records)
    test = _rows(data / "shakespeare-roles" / "test.jsonl")
    _write(out / "test.jsonl", [{"text": row["text"]} for row in test[:: len(test) // TEST][:TEST]])


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
