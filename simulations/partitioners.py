"""How each kind of partition deals units out to sites: flwr-datasets' partitioners, and four kinds that are done here.

| kind | what a site gets | of |
| --- | --- | --- |
| iid | an even share of the shuffled pool | `IidPartitioner` |
| linear, square, exponential | a share like i, i^2, e^i | `LinearPartitioner`, `SquarePartitioner`, `ExponentialPartitioner` |
| lognormal | a share drawn from a lognormal distribution of deviation `spread` | here |
| dirichlet | of each value a share drawn from Dirichlet(`alpha`) over the sites | `DirichletPartitioner` |
| inner-dirichlet | shares of the values drawn from Dirichlet(`alpha`), in a size that is given | here |
| shards | `shards_per_site` blocks of the pool sorted by value | `ShardPartitioner` |
| pathological | `values_per_site` values, drawn | `PathologicalPartitioner` |
| power-law | `values_per_site` neighbouring values, of lognormal numbers | `DistributionPartitioner` |

flwr-datasets' own way to a partition, `load_partition`, makes a data set: 1 ms each. The numbers of all rows lie in an
attribute of the partitioner once the first has been made, and are taken from there (a contract test holds them to what
`load_partition` gives). Of `IidPartitioner` only that it cuts the pool into even parts is left, which is done here.
`InnerDirichletPartitioner` needs time by rows x sites (3 s for 20,000 rows at 1,000 sites, minutes for ten times that), and
fails where a site's values are used up; here it is done anew.
"""

import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError

if TYPE_CHECKING:
    from simulations.partition import Partition, Rows

TURNS = 8  # in which sites of inner-dirichlet take their units, so that all are short of a value that is used up
SMALLEST = 1e-290  # a sum of shares below this is taken for none: dividing by it would overflow

_FEWER = "lower partition.sites or partition.min_size"
REMEDY = {  # what a person can do where a site gets too little
    "iid": _FEWER,
    "linear": f"{_FEWER}, or take kind='lognormal', which gives each its least",
    "square": f"{_FEWER}, or take kind='lognormal', which gives each its least",
    "exponential": f"{_FEWER}, or take kind='lognormal', which gives each its least",
    "lognormal": _FEWER,
    "dirichlet": f"raise partition.alpha, {_FEWER}, or take kind='inner-dirichlet', whose sizes are given",
    "inner-dirichlet": _FEWER,
    "shards": _FEWER,
    "pathological": f"{_FEWER}, or raise partition.values_per_site",
    "power-law": f"{_FEWER}, or take a number of sites that is a multiple of the number of values",
}


def deal(partition: "Partition", codes: "Rows") -> "Rows":
    """Return the site of each unit, or -1 where it is at none.

    Parameters
    ----------
    codes
        Each unit's value as a number from 0, (units,); any, where the kind goes by none.

    Raises
    ------
    ConfigError
        Where the kind cannot be had of this pool.
    RuntimeError
        Where a partitioner gives a unit to two sites, which would be a fault of its own.
    """
    draw = np.random.default_rng(partition.seed)
    order = draw.permutation(len(codes))  # as flwr_datasets.FederatedDataset does before it partitions
    match partition.kind:
        case "iid":
            parts = np.array_split(order, partition.sites or 1)
        case "lognormal":
            parts = np.split(order, np.cumsum(_sizes(partition, len(codes), draw))[:-1])
        case "inner-dirichlet":
            parts = _inner_dirichlet(partition, codes, order, draw)
        case _:
            parts = [order[part] for part in _flwr(partition, codes[order], draw)]
    home = np.full(len(codes), -1, np.int64)
    for site, part in enumerate(parts):
        home[part] = site
    if int(np.sum(home >= 0)) != sum(map(len, parts)):
        raise RuntimeError(f"partition.kind={partition.kind!r} gave a unit to two sites")
    return home


def _flwr(partition: "Partition", codes: "Rows", draw: np.random.Generator) -> list["Rows"]:
    """Return the places in `codes` that each site gets from the partitioner of flwr-datasets."""
    from datasets import Dataset

    partitioner = _partitioner(partition, int(codes.max()) + 1, draw)
    partitioner.dataset = Dataset.from_dict({"place": np.arange(len(codes)), "value": codes})
    try:
        with warnings.catch_warnings(), np.errstate(divide="raise", invalid="raise", over="raise"):
            warnings.simplefilter("ignore")  # it warns of each draw that it takes again
            partitioner.load_partition(0)
    except (ValueError, ArithmeticError, AssertionError) as error:
        raise ConfigError(
            f"partition.kind={partition.kind!r} cannot give {partition.sites} sites {partition.min_size} each: "
            f"{REMEDY[partition.kind]}."
        ) from error
    places = np.asarray(partitioner.dataset[:]["place"])  # shards sort it
    return [places[np.asarray(part, np.int64)] for part in partitioner._partition_id_to_indices.values()]


def _partitioner(partition: "Partition", values: int, draw: np.random.Generator) -> Any:
    from flwr_datasets import partitioner as flwr

    sites, seed = partition.sites or 1, partition.seed
    match partition.kind:
        case "linear":
            return flwr.LinearPartitioner(sites)
        case "square":
            return flwr.SquarePartitioner(sites)
        case "exponential":
            return flwr.ExponentialPartitioner(sites)
        case "dirichlet":
            return flwr.DirichletPartitioner(
                sites,
                "value",
                partition.alpha or 1.0,
                partition.min_size,
                self_balancing=partition.balanced,
                shuffle=False,
                seed=seed,
            )
        case "shards":
            return flwr.ShardPartitioner(sites, "value", partition.shards_per_site, shuffle=False, seed=seed)
        case "pathological":
            each = _values_per_site(partition, values)
            return flwr.PathologicalPartitioner(sites, "value", each, shuffle=False, seed=seed)
        case "power-law":
            each = _values_per_site(partition, values)
            if sites % values:
                raise ConfigError(
                    f"partition.sites={sites} is no multiple of the {values} values of partition.column={partition.by!r}, which "
                    "partition.kind='power-law' needs; take one."
                )
            # Li et al. 2020, "Federated Optimization in Heterogeneous Networks", as flwr-datasets has it.
            numbers = np.exp(draw.normal(0.0, partition.spread or 0.0, (values, each * sites // values)))
            least = math.ceil(partition.min_size / each)
            return flwr.DistributionPartitioner(numbers, sites, each, "value", least, shuffle=False, seed=seed)
        case other:
            raise RuntimeError(f"{other} is no kind of flwr-datasets")


def _values_per_site(partition: "Partition", values: int) -> int:
    each = partition.values_per_site or 1
    if each > values:
        raise ConfigError(
            f"partition.values_per_site={each} is above the {values} values of partition.column={partition.by!r}; lower it."
        )
    return each


def _sizes(partition: "Partition", units: int, draw: np.random.Generator) -> "Rows":
    """Return sizes that sum to `units`: `min_size` each, and a lognormal share of the rest."""
    sites = partition.sites or 1
    weights = np.exp(draw.normal(0.0, partition.spread or 0.0, sites))
    rest = units - sites * partition.min_size
    wanted = _rounded(weights / weights.sum() * units, units)
    if wanted.min() >= partition.min_size:  # as it was drawn
        return wanted
    return partition.min_size + _rounded(weights / weights.sum() * rest, rest)


def _rounded(shares: npt.NDArray[np.float64], total: int) -> "Rows":
    """Round to whole numbers of sum `total`, by the largest remainder."""
    whole = np.floor(shares).astype(np.int64)
    largest = np.argsort(whole - shares, kind="stable")[: total - int(whole.sum())]
    whole[largest] += 1
    return whole


def _inner_dirichlet(partition: "Partition", codes: "Rows", order: "Rows", draw: np.random.Generator) -> list["Rows"]:
    """Give each site as many units as its size says, of values by its own draw from Dirichlet(alpha).

    Acar et al. 2021, "Federated Learning Based on Dynamic Regularization", section 4, take one record at a time; here sites
    take an eighth of theirs at a time, in a random order. Where a value is used up, what is left is drawn by the site's
    other shares, and without any of these by what the pool has left.
    """
    sizes = _sizes(partition, len(codes), draw)
    left = np.bincount(codes)
    shares = draw.dirichlet(np.full(len(left), partition.alpha), size=len(sizes))
    counts, missing = np.zeros((len(sizes), len(left)), np.int64), sizes.copy()
    for turn in range(TURNS):
        for site in draw.permutation(len(sizes)):
            wanted = -(-int(missing[site]) // (TURNS - turn))
            missing[site] -= wanted
            while wanted:
                open_ = np.where(left > 0, shares[site], 0.0)
                total = open_.sum()
                chances = open_ / total if total > SMALLEST else left / left.sum()
                taken = np.minimum(draw.multinomial(wanted, chances), left)
                counts[site] += taken
                left -= taken
                wanted -= int(taken.sum())
    home = np.empty(len(codes), np.int64)
    for value in range(len(left)):
        home[order[codes[order] == value]] = np.repeat(np.arange(len(sizes)), counts[:, value])
    return np.split(np.argsort(home, kind="stable"), np.cumsum(sizes)[:-1])
