"""Who takes part in a round, and how much a reply weighs. Both rest on public values alone."""

import random
from collections.abc import Iterable

from shared.messages import JoinReply
from shared.run_config import RunConfig


def select(config: RunConfig, number: int, sites: dict[int, JoinReply]) -> list[int]:
    """Return the nodes that train in round `number`: all, or a draw by the run's seed, the same after a restart."""
    return _drawn(f"{config.seed}/{number}", config.federation.sites_per_round, sites)


def select_to_evaluate(config: RunConfig, number: int, sites: dict[int, JoinReply]) -> list[int]:
    """Return the nodes that score what round `number` published: another draw than of those that train."""
    return _drawn(f"{config.seed}/{number}/evaluate", config.evaluation.sites_per_round, sites)


def _drawn(seed: str, wanted: int | None, sites: dict[int, JoinReply]) -> list[int]:
    nodes = sorted(sites, key=lambda node: sites[node].site)
    if wanted is None or wanted >= len(nodes):
        return nodes
    drawn = random.Random(seed).sample(nodes, wanted)  # noqa: S311 - selection protects nothing
    return sorted(drawn, key=lambda node: sites[node].site)


def shuffled(config: RunConfig, number: int, sites: dict[int, JoinReply]) -> list[int]:
    """Return the nodes in the order in which a buffered round asks them: drawn by the run's seed, the same after a restart."""
    nodes = sorted(sites, key=lambda node: sites[node].site)
    return random.Random(f"{config.seed}/{number}").sample(nodes, len(nodes))  # noqa: S311 - selection protects nothing


def largest(sites: Iterable[JoinReply]) -> int:
    """Return the largest declared size."""
    return max(site.records for site in sites)


def weight(config: RunConfig, site: JoinReply, most: int) -> float:
    """Return a reply's weight: 1, or the site's declared size over the largest; in its first round at most 1."""
    return 1.0 if config.federation.weighting == "uniform" else min(1.0, site.records / most)
