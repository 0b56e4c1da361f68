"""A site with a tiny model and made-up records, and tiny models of other kinds."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client import answers, data, site
from client.privacy.ledger import Ledger
from client.privacy.randomness import Keystream
from client.resident import Resident
from client.site import Site, split_key
from shared import models
from shared.arrays import Arrays
from shared.messages import EvaluateReply, EvaluateRequest, JoinReply, JoinRequest, TrainReply, TrainRequest
from shared.models import LoadedModel
from shared.run_config import RunConfig

GOOD, BAD = ("good", "great", "fine", "lovely", "bright"), ("bad", "awful", "poor", "dull", "grim")
FILLER = ("the", "a", "film", "book", "song", "was", "is", "really", "so", "we", "found", "it", "and", "very")

Row = dict[str, Any]


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` in it, section by section."""
    result = dict(base)
    for name, value in changes.items():
        held = result.get(name)
        result[name] = merged(held, value) if isinstance(value, dict) and isinstance(held, dict) else value
    return result


@pytest.fixture(scope="session")
def new_config(tiny_model: Path) -> Callable[..., RunConfig]:
    """Make a run of three rounds of two steps at half of the records; sections are merged in."""

    def make(**changes: Any) -> RunConfig:
        base = {
            "model": {"name": str(tiny_model), "trainable": "lora", "lora": {"rank": 2, "alpha": 4}},
            "task": {"labels": ["bad", "good"], "max_length": 32},
            "training": {"rounds": 3, "sampling_rate": 0.5, "local_steps": 2, "clipping_norm": 1.0},
            "privacy": {"epsilon": 8.0, "delta": 1e-3},
            "hardware": {"precision": "float32"},
        }
        return RunConfig.model_validate(merged(base, changes))

    return make


@pytest.fixture(scope="session")
def new_rows() -> Callable[..., list[Row]]:
    """Make labelled rows whose first word tells the label, of 3 to 22 words."""

    def make(count: int = 100, prefix: str = "record") -> list[Row]:
        rows = []
        for number in range(count):
            words = (GOOD if number % 2 else BAD)[number % 5 :][:1] + tuple(
                FILLER[(number * 7 + place * (1 + number % 11)) % len(FILLER)] for place in range(2 + number * 13 % 20)
            )
            rows.append({"id": f"{prefix}-{number}", "text": " ".join(words), "label": ("bad", "good")[number % 2]})
        return rows

    return make


@pytest.fixture
def new_site(tmp_path: Path, new_rows: Callable[..., list[Row]]) -> Callable[..., Site]:
    """Write a site's folder (site.toml, records.jsonl, split.key) and load it; sections are merged in."""

    def make(name: str = "clinic", rows: list[Row] | None = None, **changes: Any) -> Site:
        folder = tmp_path / name
        folder.mkdir()
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (new_rows() if rows is None else rows))
        (folder / "records.jsonl").write_text(text, encoding="utf-8")
        (folder / "split.key").write_bytes(hashlib.sha256(b"split").digest())
        base = {
            "name": name,
            "device": "cpu",
            "dataset": {
                "id": f"notes-of-{name}",
                "path": "records.jsonl",
                "records": 100,
                "validation": 0.2,
                "labels": ["bad", "good"],
            },
            "privacy": {"max_epsilon": 200.0, "delta": 1e-3, "min_noise_multiplier": 0.3, "models": ["*"]},
        }
        site.save(Site.model_validate(merged(base, changes)), folder / "site.toml")
        return site.load(folder / "site.toml")

    return make


def keyed(name: str) -> Keystream:
    """Give the same numbers for the same request, as only a test may."""
    return Keystream(hashlib.sha256(name.encode()).digest())


@dataclass
class Desk:
    """A site at work, and the requests of a coordinator that holds the same model."""

    site: Site
    config: RunConfig
    resident: Resident = field(default_factory=Resident)
    randomness: answers.Randomness = keyed

    @property
    def model(self) -> LoadedModel:
        return self.resident.model(self.config, "cpu")

    def start(self) -> Arrays:
        """Return the arrays that the run starts from, whatever the site's model holds now."""
        return models.load(self.config).arrays()

    def join(self, run: str = "run", **changes: Any) -> JoinReply:
        shapes = models.shapes(self.model.arrays())
        values = {"run": run, "config": self.config.as_json(), "base_digest": self.model.base_digest, "shapes": shapes}
        request = JoinRequest(**(values | changes))
        reply = answers.answer(self.resident, self.site, "join", request, self.randomness)
        assert isinstance(reply, JoinReply)
        return reply

    def train(self, number: int = 1, arrays: Arrays | None = None, run: str = "run", config: str = "") -> TrainReply:
        request = TrainRequest(run, config or self.config.as_json(), number, self.start() if arrays is None else arrays)
        reply = answers.answer(self.resident, self.site, "train", request, self.randomness)
        assert isinstance(reply, TrainReply)
        return reply

    def evaluate(
        self, number: int = 1, arrays: Arrays | None = None, run: str = "run", config: str = ""
    ) -> EvaluateReply:
        request = EvaluateRequest(
            run, config or self.config.as_json(), number, self.start() if arrays is None else arrays
        )
        reply = answers.answer(self.resident, self.site, "evaluate", request, self.randomness)
        assert isinstance(reply, EvaluateReply)
        return reply

    def ledger(self) -> Ledger:
        return site.open_ledger(self.site)

    def spent(self) -> int:
        """Count what the ledger has charged."""
        with self.ledger() as ledger:
            return len(ledger.spends())

    def rows(self) -> list[Row]:
        return [json.loads(line) for line in self.site.dataset.path.read_text(encoding="utf-8").splitlines()]

    def validation_rows(self) -> list[Row]:
        """Return the rows that are kept for validation."""
        key, share = split_key(self.site), self.site.dataset.validation
        return [row for row in self.rows() if data.is_validation(row["id"], key, share)]

    def write(self, rows: list[Row]) -> None:
        self.site.dataset.path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def new_desk(new_site: Callable[..., Site], new_config: Callable[..., RunConfig]) -> Callable[..., Desk]:
    """Make a site at work: `site` and `config` hold changes, `rows` its records."""

    def make(
        *,
        site: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        rows: list[Row] | None = None,
        name: str = "clinic",
        **more: Any,
    ) -> Desk:
        run = new_config(**(config or {}))
        own = merged({"dataset": {"task": run.task.name}}, site or {})
        return Desk(new_site(name, rows, **own), run, **more)

    return make


@pytest.fixture
def desk(new_desk: Callable[..., Desk]) -> Desk:
    return new_desk()


@pytest.fixture(scope="session")
def tiny_of(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give the folder of a tiny model of another kind, with the tokenizer of `tiny_model`."""
    import torch
    from transformers import (
        AutoTokenizer,
        DistilBertConfig,
        DistilBertModel,
        GPT2Config,
        GPT2Model,
        LlamaConfig,
        LlamaModel,
        RobertaConfig,
        RobertaModel,
    )

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    words, shape = len(tokenizer), {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    makers: dict[str, Callable[[], Any]] = {
        "distilbert": lambda: DistilBertModel(
            DistilBertConfig(vocab_size=words, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64)
        ),
        "roberta": lambda: RobertaModel(
            RobertaConfig(vocab_size=words, intermediate_size=64, max_position_embeddings=66, pad_token_id=1, **shape)
        ),
        "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
        "llama": lambda: LlamaModel(
            LlamaConfig(vocab_size=words, intermediate_size=64, num_key_value_heads=2, **shape)
        ),
    }
    folders = {"bert": tiny_model}

    def give(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(f"tiny-{kind}")
            tokenizer.save_pretrained(folders[kind])
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                makers[kind]().save_pretrained(folders[kind])
        return folders[kind]

    return give
