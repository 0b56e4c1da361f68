"""What cannot be exported is said in one line, and leaves nothing behind; the command, as a person uses it."""

import json
import resource
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from server.export.cli import export as command
from server.export.folder import ExportError
from shared.errors import ModelError, MoonflowerError, NotFoundError

HEAD = {"model__trainable": "head", "warm_start__rounds": 0, "training__rounds": 2, "refit__rounds": 0}


@pytest.fixture(scope="module")
def head(train):
    """Give a run of two rounds that kept the checkpoint of its last alone."""
    return train(federation__keep_checkpoints=1, **HEAD)


@pytest.fixture
def place(tmp_path):
    """Give an empty folder to export into; nothing may be left in it by a refusal."""
    (tmp_path / "place").mkdir()
    return tmp_path / "place"


def refused(run, out: Path, form="merged", *, kind: type[MoonflowerError] = ExportError, **asked) -> str:
    before = sorted(out.parent.rglob("*")) if out.parent.exists() else []
    with pytest.raises(kind) as caught:
        run.export(out, form, **asked)
    assert (sorted(out.parent.rglob("*")) if out.parent.exists() else []) == before
    said = str(caught.value)
    assert "\n" not in said
    return said


def test_nothing_that_exists_is_replaced(head, place):
    (place / "folder").mkdir()
    (place / "file").write_text("mine")
    (place / "link").symlink_to(place / "nowhere")
    for name in ("folder", "file", "link"):
        assert "exists; name a folder that does not" in refused(head, place / name)
    assert (place / "file").read_text() == "mine"
    assert "there is no folder" in refused(head, place / "missing" / "out")


def test_a_run_without_a_committed_round_has_no_model(train, place):
    run = train(play=False, **HEAD)
    assert refused(run, place / "out", kind=NotFoundError) == (
        f"Run {run.id} has no committed round yet, and so no model; export it after its first."
    )


def test_a_round_that_is_not_there_or_not_kept_is_named_with_those_that_are(head, place):
    said = refused(head, place / "out", kind=NotFoundError, chosen=7)
    assert said == f"Run {head.id} has no committed round 7; its last is 2."
    said = refused(head, place / "out", kind=NotFoundError, chosen=1)
    assert "The checkpoint of round 1" in said
    assert "keeps those of rounds 2 (federation.keep_checkpoints)" in said


def test_a_damaged_checkpoint_is_not_exported(head, place, tmp_path):
    run = head.copy(tmp_path / "home")
    (file,) = (run.folder / "checkpoints").iterdir()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "is damaged" in refused(run, place / "out", kind=NotFoundError)
    run.history.close()


def test_only_a_lora_run_has_an_adapter(head, place):
    said = refused(head, place / "out", "adapter")
    assert "trained with model.trainable='head'; export it merged" in said
    assert "'pickle' is not a form of export; use one of adapter, merged" in refused(head, place / "out", "pickle")


def test_another_runs_folder_is_not_taken_for_the_runs(head, lora, place):
    from server.export import folder

    for wrong, said in (
        (lora.folder, f"is the folder of run {lora.id}, not of {head.id}"),
        (place, "is not the folder of run"),
    ):
        with pytest.raises(NotFoundError, match=said):
            folder.write(head.history, head.id, wrong, place / "out")


def test_a_base_model_that_was_changed_since_is_refused(tiny_model, train, place, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "model")
    run = train(model__name=str(tmp_path / "model"), **HEAD)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][7, 3] += 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    said = refused(run, place / "out", kind=ModelError)
    assert "is not the model that the run began with" in said
    shutil.rmtree(tmp_path / "model")
    assert "is not a folder" in refused(run, place / "out", kind=ModelError)


def test_a_disk_that_is_full_is_seen_before_and_a_write_that_fails_leaves_nothing(head, place, monkeypatch):
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(place)._replace(free=1_000_000)
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        assert "The export takes up to 64.1 MB, and 1 MB are free where" in refused(head, place / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (3000, 20_000):  # bytes a file may have: the tokenizer is stopped, then the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            said = refused(head, place / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written: " in said
    assert head.export(place / "out").is_dir()


def test_the_command_exports_the_newest_run_of_this_machine(head, place, monkeypatch):
    monkeypatch.setenv("MOONFLOWER_HOME", str(head.home))
    done = CliRunner().invoke(command, ["last", "--out", str(place / "model"), "--database", head.database])
    assert done.exit_code == 0, done.output
    assert f"Wrote {place / 'model'} (merged): run {head.id}, round 2." in done.output
    assert json.loads((place / "model" / "config.json").read_text())["id2label"] == {"0": "negative", "1": "positive"}
    moved = head.folder.rename(place / "elsewhere")
    try:
        words = [head.id[:-1], "--out", str(place / "two"), "--run-folder", str(moved), "--database", head.database]
        assert CliRunner().invoke(command, words).exit_code == 0
        missing = CliRunner().invoke(command, [*words[:2], str(place / "three"), *words[5:]])
        assert isinstance(missing.exception, NotFoundError)
    finally:
        moved.rename(head.folder)


def test_a_run_that_goes_on_is_exported_as_far_as_it_got(head, place, tmp_path):
    import sqlite3

    run = head.copy(tmp_path / "home")
    with sqlite3.connect(run.home / "history.db") as connection:
        connection.execute("UPDATE runs SET status = 'running', finished_at = NULL")
        connection.execute("UPDATE attempts SET outcome = NULL, ended_at = NULL")
    connection.close()
    text = (run.export(place / "out") / "README.md").read_text(encoding="utf-8")
    assert "This is round 2 of 2; the run was running when it was exported." in text
    assert "so far (2 of 2 rounds)" in text
    run.history.close()
