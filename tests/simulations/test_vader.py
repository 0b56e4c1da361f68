"""The default scenario's data: brought once and checked, split by document, and refused when it is not the pinned file."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from shared import packages
from shared.errors import DataError
from simulations import vader

COUNTS = {  # all, at the site, in the test set
    "tweets": (3432, 2753, 679),
    "film-reviews": (10070, 8072, 1998),
    "product-reviews": (2977, 2442, 535),
    "editorials": (2931, 2275, 656),
}


@pytest.fixture(scope="session")
def brought(tmp_path_factory):
    """Give a home into which pip has brought the package, once a session."""
    home = tmp_path_factory.mktemp("vader-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONFLOWER_HOME", str(home))
        vader.sentences()
    return home


@pytest.fixture
def domains(brought, monkeypatch):
    monkeypatch.setenv("MOONFLOWER_HOME", str(brought))
    return vader.sentences()


def test_the_four_domains_hold_what_they_held(domains):
    sites, test = vader.split(domains)
    counts = {name: (len(domains[name]), len(sites[name]), len(test[name])) for name in domains}
    assert counts == COUNTS
    assert len({sentence.id for members in domains.values() for sentence in members}) == sum(
        c[0] for c in COUNTS.values()
    )


def test_no_text_is_at_a_site_and_in_the_test_set_nor_twice_anywhere(domains):
    sites, test = vader.split(domains)
    texts = Counter(s.text for part in (sites, test) for members in part.values() for s in members)
    assert set(texts.values()) == {1}


def test_no_document_is_at_a_site_and_in_the_test_set(domains):
    sites, test = vader.split(domains)
    held, kept = ({s.document for members in part.values() for s in members} for part in (sites, test))
    assert not held & kept
    assert 0.15 < len(kept) / len(held | kept) < 0.25


def test_labels_are_the_sign_of_the_rating_and_neutral_texts_are_left_out(domains):
    for members in domains.values():
        assert {s.label for s in members} == {"positive", "negative"}
        assert all(abs(s.rating) >= 0.5 and (s.rating > 0) == (s.label == "positive") for s in members)
        assert all(s.text == s.text.strip() != "" for s in members)


def test_the_split_is_the_same_every_time(domains):
    assert vader.split(domains) == vader.split(vader.sentences())


def test_a_cached_file_needs_no_index(domains, brought, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert vader.sentences() == domains


def test_a_file_that_is_not_the_pinned_one_is_refused(brought, tmp_path, monkeypatch):
    shutil.copytree(brought, tmp_path / "home")
    monkeypatch.setenv("MOONFLOWER_HOME", str(tmp_path / "home"))
    (file,) = (tmp_path / "home" / "cache" / "packages").rglob("*.tar.gz")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DataError, match=r"its sha256 is [0-9a-f]{64}, not 5d7c06e0.*; delete it and try again\."):
        vader.sentences()


def test_pip_itself_refuses_a_file_with_another_digest_and_nothing_is_kept(moonflower_home):
    with pytest.raises(DataError, match=r"is not cached under .* and pip cannot bring it"):
        packages.fetch(vader.REQUIREMENT, sha256=hashlib.sha256(b"").hexdigest(), source=True)
    assert not [file for file in moonflower_home.rglob("*") if file.is_file()]


def test_offline_with_nothing_cached_is_one_clear_line_and_code_2(moonflower_home):
    done = subprocess.run(
        [Path(sys.executable).parent / "moonflower", "simulate", "--quiet"],
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: vaderSentiment==3.3.2 is not cached under ")
    assert done.stderr.endswith("; connect to a package index once.\n")
    assert len(done.stderr.splitlines()) == 1
    assert not (moonflower_home / "runs").exists()
