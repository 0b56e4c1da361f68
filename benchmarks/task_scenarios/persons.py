"""Posts of eight newsgroups at four sites, by who wrote them: a person's posts are all at one site. From 20news-bydate.

The public test set is of persons whom no site has.
"""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

SITES = ("north", "east", "south", "west")
GROUPS = {  # number in the data -> label
    "1": "graphics",
    "6": "for-sale",
    "7": "autos",
    "9": "baseball",
    "11": "crypt",
    "13": "medicine",
    "14": "space",
    "17": "mideast",
}
TEXT, TEST = 600, 800  # characters of a post, and public posts


def layout(data: Path, out: Path) -> None:
    """Write SITE.jsonl, with the column `author`, and test.jsonl."""
    folder = data / "20news-bydate"
    train = _posts(folder / "train.jsonl.gz")
    known = {post["author"] for post in train}
    strangers = [post for post in _posts(folder / "test.jsonl.gz") if post["author"] not in known]
    for number, site in enumerate(SITES):
        _write(out / f"{site}.jsonl", [post for post in train if _number(post["author"]) % len(SITES) == number])
    strangers.sort(key=lambda post: _number(post["id"]))
    _write(out / "test.jsonl", strangers[:TEST])


def _posts(file: Path) -> list[dict[str, str]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [
        {
            "id": f"{row['label']}/{row['doc']}/{number}",
            "author": row["author"],
            "text": f"{row['subject']}\n{row['text']}"[:TEXT],
            "label": GROUPS[str(row["label"])],
        }
        for number, row in enumerate(rows)
        if str(row["label"]) in GROUPS
    ]


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def _write(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
