"""Sentences about restaurants and what they say, slot by slot: the development and test parts of e2e-nlg.

A meaning representation names slots and values; a person wrote the sentence. Where a value stands in the sentence word for
word, that place is the slot's: real text, labels by rule. A value that two slots of one sentence share is nobody's.
"""

import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SLOTS = ("name", "near", "area", "food", "eatType", "priceRange", "rating")
SITES = ("north", "east", "south", "west")
EACH, TEST = 1100, 600  # sentences of a site, and of the test set

Spans = dict[str, tuple[int, int]]  # slot -> where its value begins and ends


def sentences(data: Path, split: str) -> Iterator[tuple[str, Spans]]:
    """Yield a split's sentences, each with the slots whose values stand there."""
    with gzip.open(data / "e2e-nlg" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            values = dict(re.findall(r"(\w+)\[([^\]]*)\]", row["mr"]))
            values["rating"] = values.get("rating", values.get("customer rating", ""))
            times = Counter(values.get(slot, "") for slot in SLOTS)
            spans: Spans = {}
            for slot in SLOTS:
                value = values.get(slot, "")
                found = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", row["ref"], re.IGNORECASE) if value else None
                if found and times[value] == 1:
                    spans[slot] = found.span()
            yield row["ref"], spans


def parts(data: Path) -> dict[str, list[tuple[str, Spans]]]:
    """Give the sites' sentences, drawn by lot of the development part, and test sentences of other restaurants."""
    draw = random.Random(0)  # noqa: S311 - a public split
    train, test = list(sentences(data, "validation")), list(sentences(data, "test"))
    draw.shuffle(train)
    draw.shuffle(test)
    found = {site: train[number * EACH : (number + 1) * EACH] for number, site in enumerate(SITES)}
    return found | {"test": test[:TEST]}


def write(out: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write out/NAME.jsonl, with ids."""
    lines = (
        json.dumps({"id": f"{name}/{number}", **row}, ensure_ascii=False) + "\n" for number, row in enumerate(rows)
    )
    (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
