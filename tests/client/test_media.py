"""A site whose records are images: in a folder, or named by a table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from client import answers, data
from client.resident import Resident
from client.site import Site
from shared.errors import DataError, RefusedError
from shared.run_config import RunConfig

Sites = Callable[..., Site]


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a tiny reader of images of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("tiny-vit")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **shape)).save_pretrained(folder)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def config(tiny_vit: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name": str(tiny_vit), "trainable": "head"},
            "task": {"name": "image-classification", "labels": ["bad", "good"]},
            "training": {"rounds": 1, "batch_size": 4},
            "privacy": {"epsilon": 8.0, "delta": 1e-3},
        }
    )


def paint(place: Path, grey: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((20, 20, 3), grey, dtype=np.uint8)).save(place)


def of(new_site: Sites, path: str, **more: Any) -> Site:
    return new_site(dataset={"path": path, "records": 10, "task": "image-classification", **more})


def pixels(parts: data.Parts) -> list[int]:
    """Return each image's first pixel, of both parts."""
    rows = [part.row(number) for part in (parts.train, parts.validation) for number in range(part.rows)]
    return sorted(int(next(value for value in row.values() if value.ndim > 1).flat[0]) for row in rows)


def test_a_folder_of_images_is_read_split_and_read_again_where_one_changes(new_site: Sites, config: RunConfig) -> None:
    site = of(new_site, "scans")
    for number in range(12):
        paint(site.dataset.path / ("good" if number % 2 else "bad") / f"{number}.png", number * 20)
    resident = Resident()
    parts = resident.parts(site, config)
    assert pixels(parts) == [number * 20 for number in range(12)]
    assert resident.parts(site, config) is parts
    paint(site.dataset.path / "bad" / "0.png", 77)
    assert pixels(resident.parts(site, config)) == sorted([77, *(number * 20 for number in range(1, 12))])
    assert pixels(Resident().parts(site, config)) == pixels(resident.parts(site, config))
    assert len(list((site.cache / site.dataset.id).iterdir())) == 1


def test_an_image_that_a_table_names_is_looked_at_too(new_site: Sites, config: RunConfig) -> None:
    site = of(new_site, "scans.jsonl")
    rows = [{"id": number, "image": f"{number}.png", "label": "good"} for number in range(10)]
    for number in range(10):
        paint(site.dataset.path.parent / f"{number}.png", number)
    site.dataset.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    resident = Resident()
    assert pixels(resident.parts(site, config)) == list(range(10))
    paint(site.dataset.path.parent / "0.png", 99)
    assert pixels(resident.parts(site, config)) == [*range(1, 10), 99]
    assert pixels(Resident().parts(site, config)) == [*range(1, 10), 99]
    (site.dataset.path.parent / "0.png").unlink()
    with pytest.raises(DataError):
        resident.parts(site, config)


def named(new_site: Sites, *folders: str) -> Site:
    """Give a site whose table names ten images, with the same table in other folders beside it."""
    site = of(new_site, f"{folders[0]}/scans.jsonl")
    rows = "".join(json.dumps({"id": n, "image": f"{n}.png", "label": "good"}) + "\n" for n in range(10))
    for folder in folders:
        for number in range(10):
            paint(site.dataset.path.parents[1] / folder / f"{number}.png", number)
        (site.dataset.path.parents[1] / folder / "scans.jsonl").write_text(rows, encoding="utf-8")
    return site


def test_the_same_table_in_another_folder_names_other_images(new_site: Sites, config: RunConfig) -> None:
    """A version of the data from which a patient's face was taken out, say, while the older one is still there."""
    site = named(new_site, "old", "new")
    assert pixels(Resident().parts(site, config)) == list(range(10))
    place = site.dataset.path.parents[1] / "new" / "scans.jsonl"
    paint(place.parent / "0.png", 99)
    moved = site.model_copy(update={"dataset": site.dataset.model_copy(update={"path": place})})
    assert pixels(Resident().parts(moved, config)) == [*range(1, 10), 99]


def test_a_link_that_names_another_image_now_is_followed(new_site: Sites, config: RunConfig) -> None:
    """As tools that keep versions of data do it: the older image stays where it was."""
    site = named(new_site, "data")
    link, store = site.dataset.path.parent / "0.png", site.dataset.path.parent / "store"
    paint(store / "new.png", 99)
    link.rename(store / "old.png")
    link.symlink_to(store / "old.png")
    resident = Resident()
    assert pixels(resident.parts(site, config)) == list(range(10))
    link.unlink()
    link.symlink_to(store / "new.png")
    assert pixels(resident.parts(site, config)) == [*range(1, 10), 99]
    assert pixels(Resident().parts(site, config)) == [*range(1, 10), 99]


def test_an_image_that_changes_while_it_is_encoded_is_refused(
    new_site: Sites, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = named(new_site, "data")
    encoding = data._encoded

    def slowly(record: Any, *more: Any) -> Any:
        encoded = encoding(record, *more)
        if record.id == "3":
            paint(site.dataset.path.parent / "3.png", 99)
        return encoded

    monkeypatch.setattr(data, "_encoded", slowly)
    with pytest.raises(DataError, match="has changed while it was read"):
        Resident().parts(site, config)


def test_a_run_of_another_task_is_refused_by_what_the_site_declares(new_site: Sites, config: RunConfig) -> None:
    texts = new_site("texts")
    texts.dataset.path.unlink()  # no record is looked at
    with pytest.raises(RefusedError, match=r"'image-classification' is not 'text-classification', .*\[dataset\] task"):
        answers.check_declared(texts, config)
    images = of(new_site, "scans")
    answers.check_declared(images, config)
    unlabelled = images.model_copy(update={"dataset": images.dataset.model_copy(update={"labels": ()})})
    with pytest.raises(RefusedError, match="has labels, and this site declares none"):
        answers.check_declared(unlabelled, config)
