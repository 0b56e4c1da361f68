"""Restaurants, from facts to a sentence (e2e-nlg): four sites, each with facts of its own; the model is `tiny_t5`'s."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

SITES = ("breakfast", "lunch", "tea", "dinner")


def layout(data: Path, out: Path) -> None:
    """Write SITE.jsonl and test.jsonl."""
    held: dict[str, list[dict[str, str]]] = {site: [] for site in SITES}
    for number, row in enumerate(rows(data / "e2e-nlg" / "validation.jsonl.gz")):
        site = SITES[int(hashlib.sha256(row["mr"].encode()).hexdigest(), 16) % len(SITES)]
        held[site].append({"id": str(number), "source": row["mr"], "target": row["ref"]})
    for site, records in held.items():
        _write(out / f"{site}.jsonl", records)
    test = rows(data / "e2e-nlg" / "test.jsonl.gz")[::10]
    _write(out / "test.jsonl", [{"source": row["mr"], "target": row["ref"]} for row in test])


def rows(file: Path) -> list[dict[str, Any]]:
    """Read a file of the data."""
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().split("\n") if line]


def _write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
