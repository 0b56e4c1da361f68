"""CIFAR-10's ten classes at four sites of 500 images each, as many of each class; 500 test images. From cifar10-subset."""

import json
import random
import zipfile
from pathlib import Path

SITES = ("north", "east", "south", "west")
EACH = 50  # images of a class at a site, and in the test set


def layout(data: Path, out: Path) -> None:
    """Write out/SITE.jsonl and out/test.jsonl, and the images that they name."""
    with zipfile.ZipFile(data / "cifar10-subset" / "images.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        by_class: dict[tuple[str, str], list[str]] = {}
        for name in names:
            split, label, _ = name.split("/")
            by_class.setdefault((split, label), []).append(name)
        rows: dict[str, list[str]] = {name: [] for name in (*SITES, "test")}
        for (split, label), found in by_class.items():
            for number, name in enumerate(found[: EACH * (len(SITES) if split == "train" else 1)]):
                archive.extract(name, out / "images")
                row = {"id": name, "image": f"images/{name}", "label": label}
                rows[SITES[number % len(SITES)] if split == "train" else "test"].append(json.dumps(row))
    for name, lines in rows.items():
        random.Random(0).shuffle(lines)  # noqa: S311 - which rows are scored between rounds
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
