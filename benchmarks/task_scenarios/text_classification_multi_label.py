"""Comments with any number of 28 emotions, at four sites of 4,000; 2,000 test comments. From goemotions.

Strongly imbalanced: of 43,410 comments 14,219 are neutral, 4,130 admire, 77 grieve; a comment has 1.2 labels on average.
"""

import gzip
import json
import random
from pathlib import Path

SITES = ("north", "east", "south", "west")
EACH, TEST = 4000, 2000  # records of a site, and of the test set
LABELS = (
    *("admiration", "amusement", "anger", "annoyance", "approval", "caring", "confusion", "curiosity", "desire"),
    *("disappointment", "disapproval", "disgust", "embarrassment", "excitement", "fear", "gratitude", "grief", "joy"),
    *("love", "nervousness", "optimism", "pride", "realization", "relief", "remorse", "sadness", "surprise", "neutral"),
)


def layout(data: Path, out: Path) -> None:
    """Write out/SITE.jsonl and out/test.jsonl."""
    train, test = _rows(data / "goemotions" / "train.jsonl.gz"), _rows(data / "goemotions" / "test.jsonl.gz")
    held = {site: train[number * EACH : (number + 1) * EACH] for number, site in enumerate(SITES)}
    for name, own in (held | {"test": test[:TEST]}).items():
        (out / f"{name}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")


def _rows(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)  # noqa: S311 - which comments a site has
    return [json.dumps(row | {"label": [LABELS[number] for number in row["label"]]}) for row in rows]
