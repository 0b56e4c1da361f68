"""Who takes part in a round, and how much a reply weighs. Both rest on public values alone."""

import random

from shared.messages import JoinReply
from shared.run_config import RunConfig


def select(config: RunConfig, number: int, sites: dict[int, JoinReply]) -> list[int]:
    """Return the nodes of round `number`: all, or a draw by the run's seed, the same after a restart."""
    nodes = sorted(sites, key=lambda node: sites[node].site)
    wanted = config.federation.sites_per_round
    if wanted is None or wanted >= len(nodes):
        return nodes
    drawn = random.Random(f"{config.seed}/{number}").sample(nodes, wanted)  # noqa: S311 - selection protects nothing
    return sorted(drawn, key=lambda node: sites[node].site)


def weights(config: RunConfig, sites: dict[int, JoinReply]) -> dict[int, float]:
    """Return each node's weight in (0, 1]: 1, or its declared size over the largest."""
    if config.federation.weighting == "uniform":
        return dict.fromkeys(sites, 1.0)
    largest = max(reply.records for reply in sites.values())
    return {node: reply.records / largest for node, reply in sites.items()}
