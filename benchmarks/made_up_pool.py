"""A pool of short made-up texts of two labels, for runs whose records do not matter."""

import json
import random
from pathlib import Path

from machines import BAD, FILLING, GOOD, LABELS


def made_up_pool(folder: Path, records: int) -> Path:
    """Write `records` texts of about eight words to a fresh folder as a scenario's pool, and give the folder."""
    folder.mkdir(parents=True)
    draw = random.Random(0)  # noqa: S311 - made-up texts
    with (folder / "pool.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(records):
            label = draw.randrange(2)
            words = [*draw.choices(FILLING, k=draw.randint(5, 9)), draw.choice((BAD, GOOD)[label])]
            row = {"id": f"r{number}", "text": " ".join(words), "label": LABELS[label]}
            stream.write(json.dumps(row) + "\n")
    return folder
