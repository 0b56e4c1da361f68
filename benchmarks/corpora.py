"""Labelled texts, images and sounds of five corpora as federations: who holds what, and what they are scored on.

SST-2 sentences and CIFAR-10 images are split over sites by lot; the domains of VADER and FDU-MTL and the speakers of FSDD
are sites by nature. Records for validation are SST-2's own, else a tenth of what the sites hold, by a hash of the id; sites
never train on them.
"""

import csv
import gzip
import hashlib
import json
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from simulations import vader

LABELS = ("negative", "positive")
SKEW, SMALLEST = 0.3, 50  # of Dirichlet splits: the parameter, and the records that a site must have
Row = dict[str, Any]
Split = Callable[[int], dict[str, list[Row]]]  # by seed: each site's records


@dataclass(frozen=True)
class Federation:
    """Who holds what, for which task, and what it is scored on."""

    data: str
    partition: str
    sites: int
    split: Split
    scored: Sequence[Row]
    task: str = "text-classification"


def rows(folder: Path, part: str) -> list[Row]:
    """Read a part of a corpus."""
    plain, packed = folder / f"{part}.jsonl", folder / f"{part}.jsonl.gz"
    text = plain.read_bytes() if plain.exists() else gzip.decompress(packed.read_bytes())
    found = [json.loads(line) for line in text.decode("utf-8").removesuffix("\n").split("\n")]
    return [row | {"id": f"{part}/{number}", "label": LABELS[row["label"]]} for number, row in enumerate(found)]


def lot(row: Row) -> bytes:
    """Return what decides whether a record is taken: a hash of its id."""
    return hashlib.sha256(row["id"].encode()).digest()


def kept(row: Row) -> bool:
    """Whether a record is kept for validation."""
    return lot(row)[0] < 256 / 10


def drawn(records: Sequence[Row], sites: int, skew: float | None, seed: int) -> dict[str, list[Row]]:
    """Split over sites: evenly, or each label by shares of a Dirichlet distribution, drawn again until all are large enough."""
    source = np.random.default_rng([seed, sites])
    labels = np.array([row["label"] for row in records])
    groups = (
        [np.arange(len(records))] if skew is None else [np.flatnonzero(labels == label) for label in np.unique(labels)]
    )
    while True:
        held: list[list[int]] = [[] for _ in range(sites)]
        for members in groups:
            shares = np.full(sites, 1 / sites) if skew is None else source.dirichlet([skew] * sites)
            cuts = (np.cumsum(shares)[:-1] * len(members)).round().astype(int)
            for site, part in zip(held, np.split(source.permutation(members), cuts), strict=True):
                site.extend(part.tolist())
        if min(map(len, held)) >= SMALLEST:
            return {f"site-{number}": [records[index] for index in site] for number, site in enumerate(held)}


def natural(data: str, held: dict[str, list[Row]], test: list[Row] | None) -> Federation:
    """Return the federation whose sites are the domains; without `test` it is scored on what they keep for validation."""
    trained = {name: [row for row in members if not kept(row)] for name, members in held.items()}
    scored = [row for members in held.values() for row in members if kept(row)] if test is None else test
    return Federation(data, "by domain", len(held), lambda _: trained, scored)


def by_lot(data: str, records: list[Row], scored: list[Row], counts: Sequence[int]) -> list[Federation]:
    """Return the federations of so many sites each, even ones and skewed ones."""
    kinds = [(sites, *kind) for sites in counts for kind in (("IID", None), (f"Dirichlet({SKEW})", SKEW))]
    return [Federation(data, name, sites, partial(drawn, records, sites, skew), scored) for sites, name, skew in kinds]


def images(folder: Path, *, test: bool) -> list[Federation]:
    """Read CIFAR-10's images, for four sites."""
    with zipfile.ZipFile(folder / "images.zip") as archive:
        named = [(name, *name.split("/")) for name in sorted(archive.namelist()) if name.endswith(".jpg")]
        found = [(part, {"id": name, "image": archive.read(name), "label": label}) for name, part, label, _ in named]
    trained = [row for part, row in found if part == "train"]
    scored = [row for part, row in found if part == "test"] if test else [row for row in trained if kept(row)]
    where = by_lot("CIFAR-10", [row for row in trained if not kept(row)], scored, (4,))
    return [replace(each, task="image-classification") for each in where]


def sounds(folder: Path, *, test: bool) -> Federation:
    """Read FSDD's clips of spoken digits, a site each speaker."""
    held: dict[str, list[Row]] = defaultdict(list)
    scored: list[Row] = []
    with zipfile.ZipFile(folder / "recordings.zip") as archive, (folder / "index.tsv").open(encoding="utf-8") as index:
        for clip in csv.DictReader(index, delimiter="\t"):
            row = {"id": clip["file"], "audio": archive.read(clip["file"]), "label": clip["label"]}
            (held[clip["speaker"]] if clip["split"] == "train" else scored).append(row)
    where = natural("FSDD", held, scored if test else None)
    return replace(where, partition="by speaker", task="audio-classification")


def trimmed(where: Federation, most: int) -> Federation:
    """Return the federation with `most` records of each site, and as many times the sites to score, at most."""

    def split(seed: int) -> dict[str, list[Row]]:
        return {site: sorted(members, key=lot)[:most] for site, members in where.split(seed).items()}

    return replace(where, split=split, scored=sorted(where.scored, key=lot)[: most * where.sites])


def federations(data: Path | None, *, test: bool, most: int | None = None, media: bool = False) -> list[Federation]:
    """Return what there is of the corpora, trimmed to `most` records a site, and say what is not there.

    Images and sounds are left out without `media`.
    """
    found: list[Federation] = []
    if data is not None and (folder := data / "sst2-sentences").is_dir():
        records, scored = rows(folder, "train"), rows(folder, "test" if test else "validation")
        found += by_lot("SST-2", records, scored, (4, 10))
    else:
        print("SST-2 is left out: --data names no folder with sst2-sentences.")
    held, public = (
        {site: [_row(item) for item in members] for site, members in part.items()}
        for part in vader.split(vader.sentences())
    )
    found.append(natural("VADER", held, [row for members in public.values() for row in members] if test else None))
    if data is not None and (folder := data / "fdumtl").is_dir():
        domains: dict[str, list[Row]] = defaultdict(list)
        for row in rows(folder, "train"):
            domains[row["domain"].lower()].append(row)
        found.append(natural("FDU-MTL", domains, rows(folder, "test") if test else None))
    else:
        print("FDU-MTL is left out: --data names no folder with fdumtl.")
    if media and data is not None and (folder := data / "cifar10-subset").is_dir():
        found += images(folder, test=test)
    else:
        print("CIFAR-10 is left out: --models is not given, or --data names no folder with cifar10-subset.")
    if media and data is not None and (folder := data / "fsdd").is_dir():
        found.append(sounds(folder, test=test))
    else:
        print("FSDD is left out: --models is not given, or --data names no folder with fsdd.")
    return [each if most is None else trimmed(each, most) for each in found]


def _row(sentence: vader.Sentence) -> Row:
    return {"id": sentence.id, "text": sentence.text, "label": sentence.label}
