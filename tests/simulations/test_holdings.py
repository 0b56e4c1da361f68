"""Who holds what: a pool's columns as its files have them, the counts, and `moonflower partition`."""

import csv
import json
import sys
import xml.etree.ElementTree as ET
from collections import Counter

import datasets
import numpy as np
import PIL.Image
import pytest
import tomli_w

from shared import records, tasks
from shared.cli import main
from shared.errors import ConfigError, DataError
from simulations import holdings, holdings_plot, pool_columns, scenario
from simulations.partition import assign

LABELS = ["calm", "loud"]


def row(number):
    """Give a record: its author has eight, of one ward; each third one is loud."""
    return {
        "key": f"r{number}",
        "body": f"text {number}",
        "mood": number % 3 // 2,
        "ward": f"Ward {number // 80}",
        "author": f"author {number // 8}",
    }


EVEN = {"kind": "inner-dirichlet", "alpha": 0.3, "sites": 8}


@pytest.fixture
def described(tmp_path):
    """Write a scenario beside its records; give what is read of it."""

    def write(partition=EVEN, task=None, **data):
        columns = {"id": "key", "text": "body", "label": "mood"}
        values = {
            "name": "wards",
            "model": {"name": "none"},
            "task": task or {"labels": LABELS},
            "training": {"rounds": 1, "sampling_rate": 1.0},
            "data": {
                "source": "folder",
                "folder": ".",
                "columns": columns,
                "label_names": {"0": "calm", "1": "loud"},
                **data,
            },
            **(
                {"partition": partition}
                if "kind" in partition
                else {"sites": [{"name": n, **size} for n, size in partition.items()]}
            ),
        }
        (tmp_path / "wards.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        return scenario.load(str(tmp_path / "wards.toml"), {})

    return write


def lines(path, rows):
    path.write_text("".join(json.dumps(values) + "\n" for values in rows), encoding="utf-8")


@pytest.fixture
def pool(tmp_path):
    rows = [row(number) for number in range(320)]
    lines(tmp_path / "pool.jsonl", rows)
    return rows


def as_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


FORMS = {
    "pool.jsonl": lines,
    "pool.csv": as_csv,
    "pool.parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "pool": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_row_is_the_record_of_its_number_in_every_form_of_the_pool(name, described, tmp_path):
    rows = [row(number) for number in range(120)]
    FORMS[name](tmp_path / name, rows)
    read = described(EVEN | {"column": "ward"})
    held = pool_columns.read(read, ["label", "author"])
    found = records.read(pool_columns.path(read), tasks.of(read.run_config()), read.data.layout())
    assert held["id"] == [record.id for record in found]
    assert held["label"] == [record.values["label"] for record in found] == [LABELS[of["mood"]] for of in rows]
    assert held["ward"] == [of["ward"] for of in rows]
    assert held["author"] == [of["author"] for of in rows]


def test_a_folder_of_images_is_a_pool_whose_labels_are_its_folders(described, tmp_path):
    for label in LABELS:
        (tmp_path / "pool" / label).mkdir(parents=True)
        for number in range(15):
            PIL.Image.new("RGB", (4, 4)).save(tmp_path / "pool" / label / f"{number:02d}.png")
    task = {"name": "image-classification", "labels": LABELS}
    held = holdings.of(described({"kind": "iid", "sites": 3}, task, columns={}, label_names={}))
    assert held.values == ("calm", "loud")
    assert held.counts.sum(axis=0).tolist() == [15, 15]
    assert held.units.tolist() == [10, 10, 10]


def test_the_counts_are_of_the_rows_that_each_site_has(described, pool):
    read = described()
    held, made = holdings.of(read), assign(read.partition, pool_columns.read(read))
    assert held.values == ("calm", "loud")
    for site in range(8):
        counted = Counter(LABELS[pool[number]["mood"]] for number in made.rows(site))
        assert held.counts[site].tolist() == [counted["calm"], counted["loud"]]
    assert held.records.tolist() == held.units.tolist() == [40] * 8
    assert held.declared.tolist() == [42] * 8
    assert held.left_out == 0
    alone, whole = held.counts[0] / 40, held.counts.sum(axis=0) / 320
    assert held.variation[0] == pytest.approx(abs(alone[0] - whole[0]))


def test_persons_are_counted_as_persons_and_each_is_at_one_site(described, pool):
    read = described({"kind": "iid", "sites": 3}, unit_column="author")
    held = holdings.of(read, "author")
    assert (held.unit, held.units.sum(), held.records.sum()) == ("person", 40, 320)
    assert ((held.counts > 0).sum(axis=0) == 1).all()
    assert ((held.counts > 0).sum(axis=1) == held.units).all()


def test_records_that_are_at_no_site_are_counted(described, tmp_path):
    attic = [row(number) | {"ward": "attic"} for number in range(320, 329)]
    lines(tmp_path / "pool.jsonl", [*(row(number) for number in range(320)), *attic])
    held = holdings.of(described({"kind": "by-column", "column": "ward"}))
    assert held.names == ("ward-0", "ward-1", "ward-2", "ward-3")
    assert (held.left_out, held.records.sum()) == (9, 320)


def test_sites_that_are_named_one_by_one_are_counted_as_they_are(described, tmp_path):
    lines(tmp_path / "north.jsonl", [row(number) for number in range(64)])
    as_csv(tmp_path / "south.csv", [row(number) for number in range(64, 160)])
    held = holdings.of(described({"north": {"records": 60}, "south": {"records": 100}}))
    assert (held.names, held.units.tolist(), held.declared.tolist()) == (("north", "south"), [64, 96], [60, 100])
    assert held.counts.sum(axis=1).tolist() == [64, 96]
    assert held.counts[:, 1].tolist() == [21, 32]
    held = holdings.of(described({"north": {"persons": 10}, "south": {"persons": 12}}, unit_column="author"), "ward")
    assert (held.units.tolist(), held.values) == ([8, 12], ("Ward 0", "Ward 1"))
    assert held.counts.tolist() == [[64, 0], [16, 80]]


def test_the_built_in_data_are_a_pool_of_all_domains():
    whole = scenario.load("vader-many", {"partition.sites": 50})
    held, domains = holdings.of(whole, "domain"), holdings.of(scenario.load("vader", {}))
    assert dict(zip(held.values, held.counts.sum(axis=0), strict=True)) == dict(
        zip(domains.names, domains.units, strict=True)
    )
    by = {"kind": "by-column", "column": "domain"}
    natural = holdings.of(scenario.load("vader", {"sites": "", "partition": by}))
    assert dict(zip(natural.names, natural.counts.tolist(), strict=True)) == dict(
        zip(domains.names, domains.counts.tolist(), strict=True)
    )


def test_records_without_a_label_each_are_counted_alone(described, tmp_path):
    lines(tmp_path / "pool.jsonl", [{"key": str(number), "body": "x", "mood": ["loud"]} for number in range(100)])
    held = holdings.of(described({"kind": "iid", "sites": 4}))
    assert (held.column, held.values, held.counts.tolist()) == (None, (), [[25]] * 4)
    lines(tmp_path / "pool.jsonl", [{"key": str(number), "body": "x"} for number in range(100)])
    assert holdings.of(described({"kind": "iid", "sites": 4})).counts.tolist() == [[25]] * 4


def said(call, *arguments):
    with pytest.raises((ConfigError, DataError)) as error:
        call(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


def test_a_pool_that_cannot_be_read_is_named(described, tmp_path):
    asked = EVEN | {"column": "town"}
    assert "holds no records of 'pool'; data.folder needs one pool.jsonl" in said(holdings.of, described())
    lines(tmp_path / "pool.jsonl", [row(0)])
    assert "pool.jsonl, row 1: column 'town' is missing among 'key', 'body', 'mood'" in said(
        holdings.of, described(asked)
    )
    for value, fault in ((None, "null"), (1.5, "a number"), (["a"], "a list"), (" ", "is empty")):
        lines(tmp_path / "pool.jsonl", [row(0) | {"town": "Ulm"}, row(1) | {"town": value}])
        line = said(holdings.of, described(asked))
        assert "pool.jsonl, row 2: 'town' " in line
        assert fault in line
    assert "--by town: a record lacks this column" in said(holdings.of, described({"kind": "iid", "sites": 1}), "town")
    lines(tmp_path / "pool.jsonl", [row(number) for number in range(1001)])
    assert "--by id has 1001 values; at most 1000" in said(holdings.of, described(), "id")
    as_csv(tmp_path / "pool.csv", [row(0)])
    assert "pool.jsonl are both there; keep one" in said(holdings.of, described()).replace("pool.csv", "pool.jsonl")
    assert "holds no records of 'east'" in said(holdings.of, described({"east": {"records": 10}}))


def test_sites_are_sorted_by_what_they_have_most_of_and_sampled_evenly():
    counts = np.array([[1, 9], [9, 1], [0, 10], [6, 4]])
    held = holdings.Holdings(
        ("a", "b", "c", "d"), counts.sum(1), counts.sum(1), "record", 0, "label", ("x", "y"), counts
    )
    assert holdings_plot.order(held) == [1, 3, 2, 0]
    assert holdings_plot.sample(list(range(1000)), 4) == [0, 333, 666, 999]
    assert holdings_plot.sample([3, 1], 4) == [3, 1]
    assert held.variation.tolist() == pytest.approx([0.3, 0.5, 0.4, 0.2])
    assert held.kinds.tolist() == [2, 2, 1, 2]


@pytest.fixture
def moonflower(monkeypatch, capfd):
    """Run the command line in this process, to its exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["moonflower", "partition", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capfd.readouterr()

    return run


def test_the_command_says_how_sites_differ_and_writes_nothing(moonflower, described, pool, tmp_path):
    described()
    before = sorted(tmp_path.rglob("*"))
    code, out, err = moonflower(tmp_path / "wards.toml")
    assert (code, err) == (0, "")
    assert "40 to 40, median 40" in out
    assert "site-8" in out
    code, out, _ = moonflower(
        tmp_path / "wards.toml", "--set", "partition.sites=30", "--format", "json", "--by", "ward"
    )
    given = json.loads(out)
    assert (len(given["sites"]), given["values"], given["unit"]) == (30, [f"Ward {n}" for n in range(4)], "record")
    assert sum(sum(site["counts"]) for site in given["sites"]) == sum(site["records"] for site in given["sites"]) == 320
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("sites", [3, 30, 120])
@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_the_plot_is_a_picture_for_few_sites_and_for_many(moonflower, described, tmp_path, suffix, sites):
    hostile = "<script>$x^{"
    rows = [
        {"id": str(number), "text": "x", "label": hostile if number % 2 else "plain\u202e"} for number in range(1200)
    ]
    lines(tmp_path / "pool.jsonl", rows)
    described({"kind": "inner-dirichlet", "alpha": 0.3, "spread": 1.0, "sites": sites}, columns={}, label_names={})
    drawn = tmp_path / f"sites.{suffix}"
    code, out, err = moonflower(tmp_path / "wards.toml", "--plot", drawn)
    assert (code, err) == (0, "")
    assert f"Wrote {drawn}" in "".join(out.split("\n"))
    if suffix == "png":
        with PIL.Image.open(drawn) as image:
            assert image.size[0] > 900
    elif suffix == "svg":
        assert ET.parse(drawn).getroot().tag.endswith("svg")  # noqa: S314 - our own
    else:
        page = drawn.read_text(encoding="utf-8")
        assert "<script" not in page
        assert "\u202e" not in page
        assert "declared sizes" in page


def test_a_mistake_is_one_line_and_draws_nothing(moonflower, described, pool, tmp_path):
    described()
    file = tmp_path / "wards.toml"
    for arguments, line in {
        ("--plot", tmp_path / "sites.pdf"): "must end in .png, .svg, .html",
        ("--plot", tmp_path / "none" / "sites.png"): "its folder does not exist",
        ("--set", "partition.alpha=0"): "partition.alpha=0 must be above 0",
        ("--set", "partition.kind='iid'"): "partition.alpha=0.3 is a setting of dirichlet, inner-dirichlet",
        ("--set", "partition.sites=33"): "need 330, and the pool has 320",
        ("--set", "partition.column='town'"): "column 'town' is missing",
        ("--by", "town"): "--by town: a record lacks this column",
        (
            "--set",
            "partition=",
        ): "sites are given one by one, as [[sites]], or made of a pool, by [partition]; give one",
        ("--set", "sites=[{name='a', records=10}]"): "--set sites= or --set partition= takes one out",
        ("--set", "federation.min_sites=9"): "federation.min_sites=9 is above the 8 sites",
    }.items():
        code, out, err = moonflower(
            file, *arguments, *(() if "--plot" in arguments else ("--plot", tmp_path / "a.png"))
        )
        assert (code, out) == (2, ""), err
        assert len(err.splitlines()) == 1
        assert line in err
    assert not list(tmp_path.glob("*.png"))
