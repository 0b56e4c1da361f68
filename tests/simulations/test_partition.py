"""Partitions: who gets which rows of a pool, by each kind; what cannot be had is one line."""

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.accounting import PlannedSteps, calibrate
from shared.errors import ConfigError
from shared.run_config import parse
from simulations import partitioners
from simulations.partition import SETTINGS, SIZES, Assignment, Partition, assign, declared
from simulations.prepare import ROUNDING

KINDS = {  # settings under which any pool of 2,000 rows of four values makes ten sites
    "iid": {},
    "linear": {},
    "square": {"sites": 6},
    "exponential": {"sites": 4},
    "lognormal": {"spread": 1.0},
    "dirichlet": {"alpha": 5.0},
    "inner-dirichlet": {"alpha": 0.2, "spread": 0.5},
    "shards": {"shards_per_site": 2},
    "pathological": {"values_per_site": 2},
    "power-law": {"values_per_site": 2, "spread": 1.0, "sites": 8},
    "by-column": {"column": "label", "sites": None},
}
WHOLE = set(KINDS) - {"shards", "pathological"}  # kinds that leave no row out; shards leave what no whole block is of


def partition(kind, **changes):
    own = {"kind": kind, "sites": 10, **KINDS[kind], **changes}
    return parse(Partition, {name: value for name, value in own.items() if value is not None}, source="the test")


def pool(rows=2000, values=4, seed=0):
    draw = np.random.default_rng(seed)
    return {
        "id": [str(row) for row in range(rows)],
        "label": [f"label {value}" for value in draw.integers(0, values, rows)],
    }


def told(assignment):
    """Give an assignment as plain values."""
    return assignment.names, [assignment.rows(site).tolist() for site in range(len(assignment))]


def possible(asked, held):
    """Give the assignment, or None where it is refused with one line."""
    try:
        return assign(asked, held)
    except ConfigError as error:
        return pytest.fail(repr(error)) if "\n" in str(error) else None


def refused(call, *arguments, **settings):
    """Give the one line with which a call must be refused."""
    with pytest.raises(ConfigError) as error:
        call(*arguments, **settings)
    assert str(error.value).isprintable()
    return str(error.value)


def test_every_kind_has_settings_here():
    assert set(KINDS) == set(SETTINGS) == set(partitioners.REMEDY) | {"by-column"}


def test_the_guide_names_every_kind_with_its_settings():
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "partitions.md").read_text(encoding="utf-8")
    for kind, (needed, optional) in SETTINGS.items():
        [line] = [line for line in guide.splitlines() if line.startswith("| ") and f"`{kind}`" in line.split("|")[1]]
        assert all(f"`{name}`" in line.split("|")[3] for name in (*needed, *optional)), kind
    assert ", ".join(map(str, SIZES)) in guide.replace("\n", " ")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(
    rows=st.integers(400, 2000),
    values=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31 - 1),
    sites=st.integers(1, 12),
)
def test_a_row_is_at_one_site_at_most_and_every_site_has_its_least(kind, rows, values, seed, sites):
    held = pool(rows, values, seed)
    asked = partition(kind, seed=seed, sites=None if kind == "by-column" else sites)
    made = possible(asked, held)
    if made is None:
        assert kind not in {"iid", "lognormal", "inner-dirichlet", "by-column", "shards"}
        return
    times = Counter(made.indices.tolist())
    assert max(times.values()) == 1
    assert times.keys() <= set(range(rows))
    assert made.units.tolist() == np.diff(made.offsets).tolist() == [len(rows) for rows in told(made)[1]]
    assert made.units.min() >= asked.min_size
    assert len(set(made.names)) == len(made) == (asked.sites or len(set(held["label"])))
    assert made.indices.dtype == made.offsets.dtype == np.int64
    assert all((np.diff(made.rows(site)) > 0).all() for site in range(len(made)))
    if kind in WHOLE:
        assert len(times) == rows
    elif kind == "shards":
        assert rows - len(times) < sites * 2
    else:
        assert {held["label"][row] for row in times} <= set(held["label"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_and_nothing_else_rules_who_gets_what(kind):
    held = pool()
    np.random.seed(1)  # noqa: NPY002 - a generator that anybody may have moved
    first = told(assign(partition(kind), held))
    np.random.seed(2)  # noqa: NPY002
    assert told(assign(partition(kind), held)) == first
    assert (told(assign(partition(kind, seed=1), held)) == first) == (kind == "by-column")


@pytest.mark.parametrize(
    "kind", ["dirichlet", "shards", "pathological", "power-law", "linear", "square", "exponential"]
)
def test_it_is_the_partition_that_flwr_datasets_makes(kind):
    from datasets import Dataset

    asked, codes = partition(kind, min_size=10), np.random.default_rng(1).integers(0, 4, 2000)
    home = partitioners.deal(asked, codes)
    draw = np.random.default_rng(asked.seed)
    order = draw.permutation(2000)
    theirs = partitioners._partitioner(asked, 4, draw)
    theirs.dataset = Dataset.from_dict({"row": order, "value": codes[order]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for site in range(asked.sites):
            assert sorted(theirs.load_partition(site)["row"]) == np.flatnonzero(home == site).tolist()


def test_even_parts_and_parts_by_a_column_are_those_of_flwr_datasets_too(capsys):
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner, NaturalIdPartitioner

    held = pool(503)
    order = np.random.default_rng(0).permutation(503)
    even, named = IidPartitioner(10), NaturalIdPartitioner("label")
    even.dataset = Dataset.from_dict({"row": order})
    named.dataset = Dataset.from_dict({"row": np.arange(503), "label": held["label"]})
    for kind, theirs in (("iid", even), ("by-column", named)):
        ours = assign(partition(kind), held)
        assert [sorted(theirs.load_partition(site)["row"]) for site in range(theirs.num_partitions)] == told(ours)[1]


def test_the_label_shares_are_those_of_the_kind():
    held = pool(20_000)
    labels = np.array(held["label"])

    def shares(kind, **changes):
        made = assign(partition(kind, **changes), held)
        return [sorted(Counter(labels[made.rows(site)].tolist()).values()) for site in range(len(made))]

    assert all(len(site) == 2 for site in shares("pathological"))
    assert all(len(site) <= 3 for site in shares("shards"))
    assert all(len(site) == 2 for site in shares("power-law"))
    most = {
        alpha: np.mean([max(site) / sum(site) for site in shares("inner-dirichlet", alpha=alpha)])
        for alpha in (0.05, 1000.0)
    }
    assert most[1000.0] < 0.3 < 0.7 < most[0.05]


def test_given_sizes_are_even_unless_they_are_to_spread():
    assert set(assign(partition("inner-dirichlet", spread=None), pool()).units) == {200}
    assert len(set(assign(partition("lognormal", spread=0.0), pool()).units)) == 1
    spread = assign(partition("lognormal", spread=2.0, sites=100), pool(20_000)).units
    assert spread.max() > 20 * np.median(spread)
    assert spread.min() >= 10


PERSONS = {"author": [f"author {row % 170}" for row in range(2000)]}


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"pathological", "by-column"}))
def test_a_person_is_at_one_site_whole(kind):
    held = pool() | PERSONS
    made = assign(partition(kind, sites=2 if kind in ("square", "exponential") else 4), held, unit="author")
    sites = {}
    for site in range(len(made)):
        people = {held["author"][row] for row in made.rows(site)}
        assert len(people) == made.units[site] >= 10
        assert not people & sites.keys()
        sites |= dict.fromkeys(people, site)
        assert len(made.rows(site)) == sum(author in people for author in held["author"])


def test_names_of_one_person_that_differ_in_blanks_or_accents_are_at_one_site():
    names = ["Zoë", "Zoe\u0308", " Zoë "]
    held = {"id": range(90), "who": [*names * 10, *(f"other {row}" for row in range(60))]}
    made = assign(partition("iid", sites=3), held, unit="who")
    homes = {site for site in range(3) for row in made.rows(site) if row < 30}
    assert len(homes) == 1
    assert sum(made.units) == 61


def test_a_kind_that_promises_values_takes_no_person_of_two_values():
    held = {"id": range(400), "ward": [f"ward {row % 4}" for row in range(400)]}
    together = held | {"who": [f"{row % 4}/{row // 8}" for row in range(400)]}
    made = assign(partition("by-column", column="ward"), together, unit="who")
    assert made.names == ("ward-0", "ward-1", "ward-2", "ward-3")
    apart = held | {"who": [str(row // 2) for row in range(400)]}
    for kind, changes in (("by-column", {"column": "ward"}), ("pathological", {"column": "ward", "sites": 2})):
        assert "a person is at one site" in refused(assign, partition(kind, **changes), apart, unit="who")


def test_a_person_counts_as_what_most_of_their_records_are():
    held = {"id": range(300), "who": [str(row // 3) for row in range(300)]}
    held["label"] = ["b" if row % 3 == 2 else "a" if row < 150 else "c" for row in range(300)]
    made = assign(partition("shards", shards_per_site=1, sites=2), held, unit="who")
    assert sorted(set(np.array(held["label"])[made.rows(site)]) for site in range(2)) == [{"a", "b"}, {"b", "c"}]


def test_values_of_too_few_records_are_no_site():
    held = {"id": range(125), "town": ["Bern"] * 60 + ["Ulm"] * 9 + ["Köln"] * 56}
    made = assign(partition("by-column", column="town"), held)
    assert (made.names, made.units.tolist()) == (("bern", "k-ln"), [60, 56])
    said = refused(assign, partition("by-column", column="town", min_size=61), held)
    assert (
        said == "partition.column='town' has no value with partition.min_size=61 records; the most that one has is 60."
    )


def test_sites_called_as_values_have_names_that_differ_and_that_a_site_may_have():
    values = ["A b", "a-B", "a b.2", "???", "x" * 80, "ß"]
    held = {"id": range(60), "town": [value for value in values for _ in range(10)]}
    names = assign(partition("by-column", column="town"), held).names
    assert len(set(names)) == 6
    from pydantic import TypeAdapter

    from client.site import Name

    assert all(TypeAdapter(Name).validate_python(f"{'n' * 40}.{name}") for name in names)


def test_it_is_kept_on_the_disk_and_mapped_from_there(tmp_path):
    made = assign(partition("lognormal"), pool())
    made.save(tmp_path / "sites")
    opened = Assignment.open(tmp_path / "sites")
    assert told(opened) == told(made)
    assert opened.units.tolist() == made.units.tolist()
    assert isinstance(opened.rows(3), np.memmap)
    with pytest.raises(FileExistsError):
        made.save(tmp_path / "sites")


MISTAKES = {
    "no alpha": ({"kind": "dirichlet", "sites": 3}, "needs partition.alpha"),
    "alpha of nothing": ({"kind": "dirichlet", "sites": 3, "alpha": 0.0}, "partition.alpha=0.0 must be above 0"),
    "negative alpha": ({"kind": "dirichlet", "sites": 3, "alpha": -1.0}, "must be above 0"),
    "alpha that is no number": ({"kind": "dirichlet", "sites": 3, "alpha": float("nan")}, "alpha=nan must be"),
    "alpha of iid": (
        {"kind": "iid", "sites": 3, "alpha": 1.0},
        "partition.alpha=1.0 is a setting of dirichlet, inner-",
    ),
    "a column of iid": ({"kind": "iid", "sites": 3, "column": "x"}, "partition.column='x' is a setting of dirichlet"),
    "shards of linear": ({"kind": "linear", "sites": 3, "shards_per_site": 2}, "is a setting of shards, and"),
    "balanced shards": ({"kind": "shards", "sites": 3, "shards_per_site": 2, "balanced": True}, "of dirichlet, and"),
    "no sites": ({"kind": "iid"}, "partition.sites=None: partition.kind='iid' needs how many"),
    "no site": ({"kind": "iid", "sites": 0}, "partition.sites=0 must be at least 1"),
    "sites by column": ({"kind": "by-column", "column": "x", "sites": 3}, "by-column has a site for each value"),
    "by no column": ({"kind": "by-column"}, "needs partition.column"),
    "an unknown kind": ({"kind": "random", "sites": 3}, "partition.kind='random' must be 'iid'"),
    "too small": ({"kind": "iid", "sites": 3, "min_size": 9}, "partition.min_size=9 must be at least 10"),
    "a share too many": ({"kind": "iid", "sites": 3, "shares": 1}, "unknown setting 'partition.shares'"),
}


@pytest.mark.parametrize(("values", "said"), MISTAKES.values(), ids=MISTAKES)
def test_settings_that_are_wrong_are_named(values, said):
    from simulations import scenario

    assert said in refused(scenario.load, "vader", {"sites": "", "federation.min_sites": 1, "partition": values})


def test_what_the_pool_cannot_give_is_named_with_what_to_do():
    held = pool(200)
    said = refused(assign, partition("iid", sites=21), held)
    assert said == (
        "partition.sites=21 of partition.min_size=10 records need 210, and the pool has 200; lower one of them."
    )
    assert "need 210, and the pool has 200" in refused(assign, partition("shards", sites=21), held)
    assert "column 'ward' is missing among 'id', 'label'" in refused(assign, partition("shards", column="ward"), held)
    assert "column 'who' is missing among 'id', 'label'" in refused(assign, partition("iid"), held, unit="who")
    said = refused(assign, partition("pathological", values_per_site=5), held)
    assert said == "partition.values_per_site=5 is above the 4 values of partition.column='label'; lower it."
    assert "no multiple of the 4 values" in refused(assign, partition("power-law", sites=6), held)
    said = refused(assign, partition("linear", sites=12), held)
    assert said.startswith(
        "partition.kind='linear' leaves one of 12 sites with 2 records, below partition.min_size=10; lower"
    )
    assert "cannot give 12 sites 10 each" in refused(assign, partition("exponential", sites=12), held)
    said = refused(assign, partition("dirichlet", alpha=0.01), held)
    assert "cannot give 10 sites 10 each: raise partition.alpha" in said
    many = {"id": range(3000), "label": [str(row) for row in range(3000)]}
    assert "has 3000 values, and partition.kind='shards' takes at most 1000" in refused(
        assign, partition("shards"), many
    )


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(5e-324, 1e300, exclude_min=True), kind=st.sampled_from(["dirichlet", "inner-dirichlet"]))
def test_any_alpha_gives_a_partition_or_one_line(alpha, kind):
    held = pool(400)
    made = possible(partition(kind, alpha=alpha, sites=5), held)
    assert made is not None or kind == "dirichlet"
    assert made is None or sorted(made.indices.tolist()) == list(range(400))


@pytest.mark.parametrize("scale", [1, 10**5])
def test_a_declared_size_is_one_of_few_and_within_a_tenth_of_the_truth(scale):
    sizes = np.arange(10, 20_000) * scale
    said = declared(sizes)
    assert (np.abs(said - sizes) <= ROUNDING * sizes).all()
    assert {int(str(number)[:2]) for number in set(said.tolist())} == set(SIZES)
    assert all(set(str(number)[2:]) <= {"0"} for number in set(said.tolist()))
    assert (declared(said) == said).all()


def test_sites_of_many_sizes_need_few_calibrations():
    sizes = declared(np.arange(10, 10_000))
    assert len(set(sizes.tolist())) == 3 * len(SIZES) + 1
    assert (np.diff(sizes) >= 0).all()


def test_a_size_rounded_down_means_more_noise_and_never_less():
    def noise(size):
        return calibrate((PlannedSteps(16 / size, 50),), 8.0, 1e-5)

    assert noise(86) > noise(93) > noise(100)
