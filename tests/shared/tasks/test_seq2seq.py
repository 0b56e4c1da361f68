"""Sequence to sequence: targets shifted record by record, the loss by hand, answers, and the probe on each kind of network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from writers import END, PARTS, TOKENS, TWO_PARTS, VOCABULARY, config_of, probed, two_parts

from shared import generation, models
from shared.errors import ModelError
from shared.examples import Examples, collate
from shared.models import LoadedModel
from shared.run_config import Hardware
from shared.tasks.seq2seq import Seq2Seq
from shared.tasks.tokens import IGNORED

PAIRS = (
    ("name[Blue Spice]", "Blue Spice is fine."),
    ("a", "no"),
    ("area[riverside], food[English]", "by the river, English"),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: two_parts(tmp_path_factory.mktemp(kind), kind) for kind in TWO_PARTS}


def kept(model: LoadedModel, pairs: Any = PAIRS) -> Examples:
    values = [{"source": source, "target": target} for source, target in pairs]
    return Examples.single(model.task, model.processor, [model.task.encode(each, model.processor) for each in values])


def task_of(model: LoadedModel) -> Seq2Seq:
    assert isinstance(model.task, Seq2Seq)
    return model.task


def test_the_decoder_reads_what_it_has_written_so_far_and_writes_the_target_and_its_end(
    folders: dict[str, Path],
) -> None:
    model = models.load(config_of(folders["t5"], "seq2seq"))
    row = kept(model).row(1)
    no = model.processor("no", add_special_tokens=False)["input_ids"]
    assert row["labels"].tolist() == [*no, END]
    assert row["decoder_input_ids"].tolist() == [model.module.encoder.config.decoder_start_token_id, *no]
    assert row["input_ids"].tolist() == model.processor("a")["input_ids"]


def test_source_and_target_are_cut_each_at_its_own_length(folders: dict[str, Path]) -> None:
    model = models.load(config_of(folders["t5"], "seq2seq", task={"max_target_length": 16}))
    row = kept(model, [("a" * 100, "b" * 100)]).row(0)
    assert len(row["input_ids"]) == 32
    assert len(row["labels"]) == len(row["decoder_input_ids"]) == 16
    assert END not in row["labels"]  # what is cut does not end there
    assert model.task.width(row) == (32, 16)


@pytest.mark.parametrize("kind", list(TWO_PARTS))
@torch.no_grad()
def test_a_records_loss_is_its_own_whatever_it_is_padded_to(folders: dict[str, Path], kind: str) -> None:
    model = models.load(config_of(folders[kind], "seq2seq"))
    examples = kept(model)
    expected = []
    for number in range(3):
        row = {name: torch.from_numpy(array).long().unsqueeze(0) for name, array in examples.row(number).items()}
        labels = row.pop("labels")[0]
        logits = model.module.encoder(**row).logits[0].double()
        each = [float(logits[place].logsumexp(0) - logits[place, label]) for place, label in enumerate(labels)]
        expected.append(sum(each) / len(each))
    for width in (None, (48, 48)):
        batch = collate(examples, [(0,), (1,), (2,)], torch.device("cpu"), width)
        assert model.task.losses(model.outputs(batch), batch).tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", list(TWO_PARTS))
@torch.no_grad()
def test_the_labels_are_transformers_own_shift_to_the_right(folders: dict[str, Path], kind: str) -> None:
    """Given labels, a model of transformers shifts them by itself: its loss on one record is ours."""
    model = models.load(config_of(folders[kind], "seq2seq"))
    batch = collate(kept(model), [(2,)], torch.device("cpu"))
    theirs = model.module.encoder(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    ).loss
    assert float(model.task.losses(model.outputs(batch), batch)) == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("trainable", ["full", "lora"])
@pytest.mark.parametrize("kind", list(TWO_PARTS))
def test_one_pass_gives_each_records_own_gradient(folders: dict[str, Path], kind: str, trainable: str) -> None:
    lora = {"rank": 2, "targets": ["q", "v"] if kind == "t5" else ["q_proj", "v_proj"]}
    changes = {"model": {"trainable": trainable, "lora": lora}, "hardware": {"gradients": "one-pass"}}
    assert probed(config_of(folders[kind], "seq2seq", **changes)) == "one-pass"


@pytest.mark.parametrize("kind", list(TWO_PARTS))
def test_answers_are_those_of_transformers_own_greedy_search(folders: dict[str, Path], kind: str) -> None:
    model = models.load(config_of(folders[kind], "seq2seq", task={"max_target_length": 12}))
    examples, network = kept(model), model.module.encoder.eval()
    found = generation.answers(network, task_of(model), examples, Hardware())
    for number, ids in enumerate(found):
        batch = collate(examples, [(number,)], torch.device("cpu"))
        theirs = network.generate(  # type: ignore[operator]
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, num_beams=1,
            max_length=12, forced_eos_token_id=None,
        )[0, 1:].tolist()  # fmt: skip
        assert ids == (theirs[: theirs.index(END)] if END in theirs else theirs)
        assert ids


def test_public_records_are_answered_and_scored_and_sites_scores_need_no_answer(folders: dict[str, Path]) -> None:
    model = models.load(config_of(folders["bart"], "seq2seq", task={"max_target_length": 12}))
    values = [{"source": source, "target": target} for source, target in PAIRS]
    found = {score.name: score.value for score in model.task.public_scores(model, values, kept(model), Hardware())}
    assert found.keys() == {"chrf", "rouge1", "rouge_l"}
    assert all(0 <= value <= 1 for value in found.values())
    assert model.task.scores(np.ones(3), 0.0)[0].name == "loss"


def test_what_nothing_is_learnt_from_has_no_loss(folders: dict[str, Path]) -> None:
    model = models.load(config_of(folders["t5"], "seq2seq"))
    row = model.task.stand_in({"source": "any", "target": "any"})
    assert (row["labels"] == IGNORED).all()
    batch = collate(Examples.single(model.task, model.processor, [row]), [(0,)], torch.device("cpu"))
    assert model.task.losses(model.outputs(batch), batch).tolist() == [0.0]


def test_a_model_that_does_not_say_how_an_answer_begins_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    import json
    import shutil

    folder = Path(shutil.copytree(folders["t5"], tmp_path / "copy"))
    for name in ("config.json", "generation_config.json"):
        held = json.loads((folder / name).read_text(encoding="utf-8"))
        held.pop("decoder_start_token_id", None)
        (folder / name).write_text(json.dumps(held), encoding="utf-8")
    with pytest.raises(ModelError, match="decoder_start_token_id"):
        models.load(config_of(folder, "seq2seq"))


def test_experts_with_room_for_so_many_tokens_of_a_batch_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record's tokens lose their expert to its neighbours', in batches larger than the probe's."""
    settings = transformers.NllbMoeConfig(
        vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64, decoder_start_token_id=END, num_experts=4,
        expert_capacity=64, encoder_sparse_step=1, decoder_sparse_step=1, **PARTS, **TOKENS,
    )  # fmt: skip
    monkeypatch.setitem(TWO_PARTS, "nllb-moe", lambda: settings)
    folder = two_parts(tmp_path, "nllb-moe")
    with pytest.raises(
        ModelError, match=r"has experts with room for so many tokens of a batch \('.*router' and \d+ more"
    ):
        models.load(config_of(folder, "seq2seq", model={"trainable": "lora", "lora": {"targets": "attention"}}))
