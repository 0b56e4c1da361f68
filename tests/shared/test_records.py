"""The same records, whatever file or folder they lie in."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from shared import record_files, records, tasks
from shared.media import Clip, Image, resample
from shared.records import Layout, Record
from shared.run_config import RunConfig
from shared.tasks.base import Task

ROWS = [{"id": "01", "text": "a, \u2028 film", "label": "good"}, {"id": "NA", "text": "1e3\nNaN", "label": "bad"}]


def task_of(name: str = "text-classification", **settings: Any) -> Task:
    """Return a task of two labels."""
    labels = {"labels": ["bad", "good"]} if name.endswith("classification") else {}
    values = {"name": name, **labels, **settings}
    run = {"model": {"name": "any"}, "task": values, "training": {"rounds": 1, "batch_size": 1}}
    return tasks.of(RunConfig.model_validate(run))


def write(folder: Path, kind: str) -> Path:
    """Write ROWS in one of the forms."""
    path = folder / f"records.{kind}"
    table = pyarrow.table({name: [row[name] for row in ROWS] for name in ROWS[0]})
    match kind:
        case "jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
        case "csv":
            text = 'id,text,label\r\n01,"a, \u2028 film",good\r\nNA,"1e3\nNaN",bad\r\n'
            path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        case "parquet":
            pyarrow.parquet.write_table(table, path)
        case "arrow":
            with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        case "saved":
            names = datasets.ClassLabel(names=["bad", "good"])
            kept = datasets.Features({"id": datasets.Value("string"), "text": datasets.Value("string"), "label": names})
            datasets.Dataset.from_list(ROWS, features=kept).save_to_disk(path, num_shards=2)
        case "shards":
            path.mkdir()
            for number, row in enumerate(ROWS):
                (path / f"part-{number}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "arrow", "saved", "shards"])
def test_records_are_the_same_in_every_format(kind: str, tmp_path: Path) -> None:
    found = records.read(write(tmp_path, kind), task_of())
    assert found == [Record(row["id"], row["id"], {"text": row["text"], "label": row["label"]}) for row in ROWS]


def test_columns_and_labels_are_mapped_and_a_person_is_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "notes.csv"
    path.write_text("key,body,triage,who\n7,a note,01,\u00e9va\n8,more,1, e\u0301va \n", encoding="utf-8")
    layout = Layout({"id": "key", "text": "body", "label": "triage"}, {"01": "bad", "1": "good"}, "who")
    found = records.read(path, task_of(), layout)
    assert [(each.id, each.values["label"]) for each in found] == [("7", "bad"), ("8", "good")]
    assert found[0].unit == found[1].unit


def test_numbers_and_truths_are_labels_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "text": ["a", "b"], "label": [True, False]}), path)
    layout = Layout(label_names={"true": "good", "false": "bad"})
    assert [each.values["label"] for each in records.read(path, task_of(), layout)] == ["good", "bad"]


def test_a_column_that_is_not_needed_may_be_left_out_but_where_it_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [{"id": 1, "text": "a"}, {"id": 2, "prompt": "b", "completion": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = task_of("causal-lm")
    assert [sorted(each.values) for each in records.read(path, task)] == [["text"], ["completion", "prompt"]]
    with pytest.raises(records.DataError, match="row 2: column 'text' is missing"):
        records.read(path, task, Layout({"text": "text"}))


def test_lists_may_be_json_in_a_cell(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('id,text,label\n1,a,"[""good"", ""bad""]"\n2,b,[]\n', encoding="utf-8")
    found = records.read(path, task_of(multi_label=True))
    assert [each.values["label"] for each in found] == [("good", "bad"), ()]


def test_rows_are_read_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{\n", encoding="utf-8")
    assert next(records.each(path, task_of())).id == "01"


# -- images --------------------------------------------------------------------------------------------------------


def put(place: Path, pixels: Any, mode: str | None = None) -> Path:
    """Write an image."""
    place.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.asarray(pixels), mode).save(place) if mode is None else PIL.Image.new(mode, pixels).save(
        place
    )
    return place


def test_an_image_folder_labels_by_folder_and_names_by_path(tmp_path: Path) -> None:
    for name, value in (("good/b.png", 7), ("good/deep/bad/a.PNG", 8), ("bad/a.jpg", 9)):
        put(tmp_path / name, np.full((2, 3, 3), value, dtype=np.uint8))
    (tmp_path / ".DS_Store").write_bytes(b"of a file manager")
    found = records.read(tmp_path, task_of("image-classification"))
    assert [(each.id, each.values["label"]) for each in found] == [
        ("bad/a.jpg", "bad"),
        ("good/b.png", "good"),
        ("good/deep/bad/a.PNG", "bad"),
    ]
    image = found[1].values["image"]
    assert isinstance(image, Image)
    assert image.size == (3, 2)
    assert np.asarray(image.open()).tolist() == [[[7, 7, 7]] * 3] * 2


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_give_labels_ids_and_persons(name: str, tmp_path: Path) -> None:
    put(tmp_path / "x" / "a.png", np.zeros((2, 2, 3), dtype=np.uint8))
    row = {"file_name": "x/a.png", "label": "good", "scan": "s1", "patient": "p1"}
    text = ",".join(row) + "\n" + ",".join(row.values()) + "\n" if name.endswith("csv") else json.dumps(row) + "\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    (found,) = records.read(tmp_path, task_of("image-classification"), Layout({"id": "scan"}, {}, "patient"))
    assert (found.id, found.unit, found.values["label"]) == ("s1", "p1", "good")


@pytest.mark.parametrize("held", ["bytes", "struct", "path"])
def test_a_table_holds_images_as_bytes_or_names_them(held: str, tmp_path: Path) -> None:
    content = put(tmp_path / "a.png", np.full((2, 2, 3), 5, dtype=np.uint8)).read_bytes()
    value = {
        "bytes": content,
        "struct": {"bytes": content, "path": "gone.png"},
        "path": {"bytes": None, "path": "a.png"},
    }
    table = pyarrow.table({"id": [1], "image": [value[held]], "label": ["good"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (found,) = records.read(tmp_path / "x.parquet", task_of("image-classification"))
    assert np.asarray(found.values["image"].open())[0, 0].tolist() == [5, 5, 5]
    assert "PNG" not in repr(found)  # no bytes of a record in a log


def test_every_mode_becomes_rgb_by_its_rule(tmp_path: Path) -> None:
    def opened(name: str) -> Any:
        (tmp_path / "x.jsonl").write_text(json.dumps({"id": 1, "image": name, "label": "good"}), encoding="utf-8")
        (found,) = records.read(tmp_path / "x.jsonl", task_of("image-classification"))
        return np.asarray(found.values["image"].open())

    put(tmp_path / "deep.png", np.full((2, 2), 40_000, dtype=np.uint16))
    assert opened("deep.png")[0, 0].tolist() == [155] * 3  # of 255, as 40,000 of 65,535
    PIL.Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert opened("clear.png")[0, 0].tolist() == [255] * 3
    turned = PIL.Image.new("RGB", (4, 2))
    exif = PIL.Image.Exif()
    exif[274] = 6  # lies on its side
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert opened("turned.jpg").shape == (4, 2, 3)


# -- sound ---------------------------------------------------------------------------------------------------------


def clip_of(folder: Path, samples: Any, rate: int, kind: str = "WAV") -> Clip:
    """Read a clip back, as a record's bytes."""
    stream = io.BytesIO()
    soundfile.write(stream, np.asarray(samples, dtype=np.float32), rate, format=kind)
    table = pyarrow.table({"id": [1], "audio": [{"bytes": stream.getvalue()}], "label": ["good"]})
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    (found,) = records.read(folder / "x.parquet", task_of("audio-classification"))
    clip = found.values["audio"]
    assert isinstance(clip, Clip)
    return clip


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 48_000])
def test_a_tone_of_any_rate_is_the_same_tone_at_the_models(rate: int, tmp_path: Path) -> None:
    times = np.arange(rate) / rate
    clip = clip_of(tmp_path, 0.5 * np.sin(2 * np.pi * 440 * times), rate, "FLAC")
    found = clip.samples(16_000)
    assert (clip.rate, clip.seconds, found.dtype, found.shape) == (rate, 1.0, np.float32, (16_000,))
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    assert np.abs(found - wanted)[500:-500].max() < 5e-3


def test_channels_are_averaged_and_a_clip_is_cut_where_it_is_asked(tmp_path: Path) -> None:
    both = np.stack([np.full(8000, 0.5), np.full(8000, -0.25)], axis=1)
    clip = clip_of(tmp_path, both, 8000)
    assert np.allclose(clip.samples(), 0.125, atol=1e-4)
    assert clip.samples(8000, most_seconds=0.25).shape == (2000,)
    assert resample(np.ones(3, dtype=np.float32), 8000, 8000).tolist() == [1, 1, 1]


def test_a_folder_of_clips_and_their_transcripts(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8000)
    (tmp_path / "metadata.csv").write_text("file_name,transcript\na.wav,hello\n", encoding="utf-8")
    (found,) = records.read(tmp_path, task_of("speech-to-text"))
    assert (found.id, found.values["transcript"], found.values["audio"].frames) == ("a.wav", "hello", 800)


def test_the_folder_of_a_table_is_where_its_files_lie(tmp_path: Path) -> None:
    assert record_files.base(tmp_path / "x.csv") == record_files.base(tmp_path) == tmp_path
