"""A site's own configuration file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from client import site
from client.site import Site
from shared.errors import ConfigError

MINIMAL = """
name = "clinic"
[dataset]
id = "notes-2026"
path = "records.jsonl"
records = 1200
labels = ["bad", "good"]
[privacy]
max_epsilon = 8.0
"""


def write(folder: Path, text: str) -> Path:
    (folder / "site.toml").write_text(text, encoding="utf-8")
    return folder / "site.toml"


def test_paths_are_relative_to_the_file_and_the_rest_has_cautious_defaults(tmp_path: Path) -> None:
    own = site.load(write(tmp_path, MINIMAL))
    assert own.dataset.path == tmp_path / "records.jsonl"
    assert (own.ledger, own.split_key) == (tmp_path / "ledger.db", tmp_path / "split.key")
    assert own.privacy.allow_non_private is False
    assert own.privacy.max_run_epsilon == 8.0
    assert own.privacy.delta == 1e-5
    assert own.dataset.card().train_records == 1080
    absolute = site.load(write(tmp_path, 'ledger = "/var/ledger.db"\n' + MINIMAL))
    assert absolute.ledger == Path("/var/ledger.db")


def test_what_is_saved_is_what_is_loaded(new_site: Callable[..., Site], tmp_path: Path) -> None:
    own = new_site()
    site.save(own, tmp_path / "copy.toml")
    assert site.load(tmp_path / "copy.toml") == own


@pytest.mark.parametrize(
    ("line", "other", "said"),
    [
        ('name = "clinic"', 'name = "Clinic 1"', "name="),
        ("records = 1200", "records = 9", "dataset.records=9"),
        ("records = 1200", 'records = "1200"', "dataset.records="),
        ("records = 1200", "", "dataset.records is missing"),
        ('labels = ["bad", "good"]', "", "dataset.labels is missing"),
        ("max_epsilon = 8.0", "", "privacy.max_epsilon is missing"),
        ("max_epsilon = 8.0", "max_epsilon = inf", "privacy.max_epsilon="),
        ("max_epsilon = 8.0", "max_epsilon = 0.0", "privacy.max_epsilon="),
        ("max_epsilon = 8.0", "max_epsilon = 8.0\nmax_epsillon = 9.0", "unknown setting 'privacy.max_epsillon'"),
        ("max_epsilon = 8.0", "max_epsilon = ", "is not TOML"),
        ("[privacy]", "[policy]", "the section [policy] is now called [privacy]; rename it"),
    ],
)
def test_a_setting_at_fault_is_named_in_one_line(tmp_path: Path, line: str, other: str, said: str) -> None:
    assert line in MINIMAL
    with pytest.raises(ConfigError, match=r"site\.toml") as fault:
        site.load(write(tmp_path, MINIMAL.replace(line, other)))
    assert said in str(fault.value)
    assert "\n" not in str(fault.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        site.load(tmp_path / "site.toml")
