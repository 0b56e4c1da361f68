"""The root command: quick to help, documented, and one line for every mistake."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared import __version__
from shared.cli import COMMANDS, HELP

MOONFLOWER = str(Path(sys.executable).parent / "moonflower")


def call(*arguments, **environment):
    return subprocess.run(
        [MOONFLOWER, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_lists_the_commands_and_imports_no_heavy_library():
    code = (
        "import sys; sys.argv = ['moonflower', '--help']; from shared.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: code = done.code\n"
        "print(code, *sorted({'torch', 'flwr', 'sqlalchemy', 'pydantic', 'rich', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, last = done.stdout.splitlines()
    assert last == "0"
    for name in COMMANDS:
        assert any(line.split() and line.split()[0] == name and len(line.split()) > 3 for line in printed), name
    assert "Example: moonflower" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example_and_needs_no_torch(command):
    code = (
        f"import sys; sys.argv = ['moonflower', {command!r}, '--help']; from shared.cli import main\n"
        "try: main()\n"
        "except SystemExit as done: code = done.code\n"
        "print(code, *sorted({'torch', 'flwr', 'sqlalchemy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"Example: moonflower {command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "0"


def test_every_command_has_its_one_line():
    assert set(HELP) == set(COMMANDS)
    assert all(text.endswith(".") for text in HELP.values())


def test_the_version_is_the_packages():
    assert call("--version").stdout == f"moonflower, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command 'nonsense'."),
        (["--nonsense"], "No such option"),
        (["history", "x"], "No such command"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, said):
    done = call(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_command_at_all_shows_the_help():
    done = call()
    assert "simulate" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_shell_completion_works():
    assert "_MOONFLOWER_COMPLETE=bash_complete" in call(_MOONFLOWER_COMPLETE="bash_source").stdout
    completed = call(_MOONFLOWER_COMPLETE="bash_complete", COMP_WORDS="moonflower his", COMP_CWORD="1")
    assert completed.stdout == "plain,history\n"
