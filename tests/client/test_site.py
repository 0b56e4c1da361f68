"""A site's own configuration file."""

from collections.abc import Callable
from pathlib import Path

import pytest

from client import site
from client.site import Site
from shared.errors import ConfigError, DataError, RefusedError

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
    assert site.load(tmp_path / "copy.toml").model_dump() == own.model_dump()


@pytest.mark.parametrize(
    ("line", "other", "said"),
    [
        ('name = "clinic"', 'name = "Clinic 1"', "name="),
        ("records = 1200", "records = 9", "dataset.records=9"),
        ("records = 1200", 'records = "1200"', "dataset.records="),
        ("records = 1200", "", "dataset.records is missing"),
        ('labels = ["bad", "good"]', 'task = "No Task"', "dataset.task="),
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


def test_a_site_reads_again_what_its_owner_has_tightened_meanwhile(new_site: Callable[..., Site]) -> None:
    own = new_site()
    file = own.ledger.parent / "site.toml"
    assert site.reread(own) == own
    file.write_text(file.read_text().replace("max_epsilon = 200.0", "max_epsilon = 2.0"))
    assert site.reread(own).privacy.max_epsilon == 2.0
    assert site.reread(own).dataset == own.dataset


@pytest.mark.parametrize(
    ("line", "other"), [('device = "cpu"', 'device = "auto"'), ("records = 100", "records = 90"), ("ledger", "#ledger")]
)
def test_a_site_that_is_another_than_before_sends_nothing(new_site: Callable[..., Site], line: str, other: str) -> None:
    own = new_site()
    file = own.ledger.parent / "site.toml"
    assert line in file.read_text()
    file.write_text(file.read_text().replace(line, other, 1).replace("#ledger = ", 'ledger = "new.db"\n#'))
    with pytest.raises(RefusedError, match=r"site.toml has changed while the answer was made; ask again\.$"):
        site.reread(own)


def test_why_a_site_cannot_read_its_file_again_stays_there(new_site: Callable[..., Site]) -> None:
    own = new_site()
    file = own.ledger.parent / "site.toml"
    file.write_text(file.read_text() + "secret = 1\n")
    with pytest.raises(DataError, match="secret"):
        site.reread(own)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        site.reread(own)


def test_how_a_site_is_connected_is_relative_to_its_file(new_site: Callable[..., Site]) -> None:
    own = new_site(coordinator={"name": "north", "address": "coordinator.example.org:9443"})
    folder = own.dataset.path.parent
    assert own.coordinator is not None
    assert (own.coordinator.ca, own.coordinator.key) == (folder / "ca.pem", folder / "site.key")
    assert own.coordinator.state == folder / "state"


@pytest.mark.parametrize("address", ["coordinator.example.org", "https://a:1", "a b:9443", ":9443", "a:9443/path"])
def test_an_address_that_is_none_is_refused(new_site: Callable[..., Site], address: str) -> None:
    with pytest.raises(ValueError, match="address"):
        new_site(coordinator={"name": "north", "address": address})


def test_a_node_may_choose_another_device_and_the_site_is_still_its_own(new_site: Callable[..., Site]) -> None:
    file = new_site().dataset.path.parent / "site.toml"
    chosen = site.load(file, "cuda:1")
    assert chosen.device == "cuda:1"
    assert site.reread(chosen) == chosen
