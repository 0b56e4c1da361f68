"""The guide and the kits' READMEs: their example is a federation, and their commands exist."""

import re
import shlex
import textwrap
from pathlib import Path

import click
import pytest

from server.provision import federation, provisioning
from shared.cli import root

GUIDE = Path(__file__).parents[3] / "docs/guides/deployment.md"


def example(text: str) -> str:
    """Give the first indented block that begins a federation.toml."""
    block = re.search(r"(?m)^    name = .*\n(?:    .*\n|\n)*", text)
    assert block
    return textwrap.dedent(block[0])


def commands(text: str) -> list[str]:
    """Give the lines of indented blocks that call moonflower, without their comments."""
    found = re.findall(r"^    (moonflower .*)$", text, flags=re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in found]


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    (folder / "federation.toml").write_text(example(GUIDE.read_text(encoding="utf-8")))
    provisioning.make(folder / "federation.toml", folder / "kits")
    return folder / "kits"


def test_the_example_at_the_top_of_the_module_is_a_federation(tmp_path: Path) -> None:
    assert federation.__doc__
    (tmp_path / "federation.toml").write_text(example(federation.__doc__))
    assert federation.load(tmp_path / "federation.toml").site("st-marys").dataset.records == 4000


def test_every_command_of_the_guide_and_of_the_kits_can_be_parsed(kits: Path) -> None:
    texts = [GUIDE, *kits.rglob("README.md")]
    lines = [line for path in texts for line in commands(path.read_text(encoding="utf-8"))]
    assert len(lines) >= 25
    for line in lines:
        command: click.Command | None = root
        context, words = click.Context(root), shlex.split(line)[1:]
        while isinstance(command, click.Group):
            known = words and words[0] in command.list_commands(context)
            command = command.get_command(context, words.pop(0) if known else "make")
        assert command is not None, line
        command.make_context(line, words)  # an unknown option or a missing one is an error


def test_what_the_guide_says_is_in_a_kit_is_there(kits: Path) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for kit in ("coordinator", "sites/county", "users/ada"):
        table = (kits / kit / "README.md").read_text(encoding="utf-8").partition("## Files")[2].partition("\n## ")[0]
        named = {name for row in re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE) for name in row.split(", ")}
        assert named - {"file", "---"} == {path.name for path in (kits / kit).iterdir()} - {"README.md"}
    for name in ("server.toml", "enrolment.json", "tokens.json", "site.toml", "servers.toml", "ca.pem"):
        assert name in text
