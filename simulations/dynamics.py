"""What happens to sites that nobody plans: they drop out, are slow, come late, leave, and have less budget than the run takes.

Everything is a function of the scenario's seed, the site's name and the round: the same for any number of workers, in any
order of questions, and after a resume. It is a study's weather and protects nothing.
"""

import hashlib
import math
from collections.abc import Iterator
from functools import cache
from statistics import NormalDist
from typing import Annotated

from pydantic import Field

from shared.messages import Kind
from shared.run_config import Positive, Section

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
STANDARD = NormalDist()


class Dropout(Section):
    """Sites that are asked and do not answer: `rate` of all questions.

    With a `concentration` each site has a rate of its own, beta-distributed around that one, the closer the larger it is. The
    coordinator hears of it `notice` seconds later, as from a SuperLink whose node has missed its heartbeats.
    """

    rate: float = Field(0.0, ge=0, lt=1)
    concentration: Positive | None = None
    notice: NotNegative = 60.0


class Speed(Section):
    """How long sites take: lognormal, with these medians in seconds.

    `sigma` is the deviation of the logarithm over the sites, once for all rounds; `jitter` over a site's rounds.
    """

    step: NotNegative = 1.0  # one local step
    evaluation: NotNegative = 1.0  # one histogram
    sigma: NotNegative = 0.0
    jitter: NotNegative = 0.0


class Network(Section):
    """How long messages take: `latency` seconds and their bytes over the site's bandwidth, each way; lognormal."""

    bandwidth: Positive | None = None  # median bytes a second; None: they take no time
    sigma: NotNegative = 0.0
    latency: NotNegative = 0.0


class Churn(Section):
    """Sites that come and go: the share `late` comes after the start, all stay for a while, and may come back.

    All three times are exponential, with these means in seconds.
    """

    late: float = Field(0.0, ge=0, le=1)
    arrival: Positive = 3600.0
    lifetime: Positive | None = None  # None: to the end
    absence: Positive | None = None  # None: for good


class Budget(Section):
    """Sites whose budget does not last: what they have left is `share` of what the run was planned to spend, lognormal.

    Each joins with the scenario's policy; other runs then take what is more than its share. Its own ledger says no when that
    is spent. A share of 1 or more lasts to the end.
    """

    share: Positive = 1.0  # the median
    sigma: NotNegative = 0.0


class Dynamics(Section):
    """All of it. What is not set does not happen."""

    dropout: Dropout = Dropout()
    speed: Speed = Speed()
    network: Network = Network()
    churn: Churn = Churn()
    budget: Budget | None = None


class Weather:
    """What becomes of each site and question, drawn from a seed."""

    def __init__(self, dynamics: Dynamics, seed: int) -> None:
        self.dynamics, self.seed = dynamics, seed
        self._rate = cache(self._rate_of)

    def uniform(self, *what: str | int) -> float:
        """Return a number between 0 and 1, both excluded, that belongs to these words."""
        text = "\0".join(str(each) for each in (self.seed, *what))
        return (int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") + 0.5) / 2**48

    def dropped(self, site: str, number: int, kind: Kind, before: int = 0) -> float | None:
        """Return after which share of its work a site drops out of a question that it was asked `before`; None: it answers."""
        if self.uniform(site, number, kind, before, "drops out") >= self._rate(site):
            return None
        return self.uniform(site, number, kind, before, "drops out after")

    def work(self, site: str, number: int, kind: Kind, steps: int) -> float:
        """Return the seconds that a site computes for an answer."""
        speed = self.dynamics.speed
        median = speed.evaluation if kind == "evaluate" else speed.step * steps
        slow = speed.sigma * self._normal(site, "speed") + speed.jitter * self._normal(site, number, kind, "speed")
        return median * math.exp(slow)

    def transfer(self, site: str, size: int) -> float:
        """Return the seconds that a message of so many bytes takes to or from a site."""
        network = self.dynamics.network
        if network.bandwidth is None:
            return network.latency
        return network.latency + size / network.bandwidth * math.exp(network.sigma * self._normal(site, "bandwidth"))

    def stays(self, site: str) -> Iterator[tuple[float, float]]:
        """Yield the times, in seconds, from and until which a site is there."""
        churn, begin = self.dynamics.churn, 0.0
        if self.uniform(site, "late") < churn.late:
            begin = churn.arrival * self._exponential(site, "arrival")
        number = 0
        while True:
            number += 1
            if churn.lifetime is None:
                yield begin, math.inf
                return
            end = begin + churn.lifetime * self._exponential(site, number, "lifetime")
            yield begin, end
            if churn.absence is None:
                return
            begin = end + churn.absence * self._exponential(site, number, "absence")

    def share(self, site: str) -> float:
        """Return how much of what the run plans to spend a site's budget has left."""
        budget = self.dynamics.budget
        return math.inf if budget is None else budget.share * math.exp(budget.sigma * self._normal(site, "budget"))

    def _rate_of(self, site: str) -> float:
        rate, concentration = self.dynamics.dropout.rate, self.dynamics.dropout.concentration
        if concentration is None or rate == 0:
            return rate
        from scipy.special import betaincinv

        return float(betaincinv(rate * concentration, (1 - rate) * concentration, self.uniform(site, "dropout")))

    def _normal(self, *what: str | int) -> float:
        return STANDARD.inv_cdf(self.uniform(*what))

    def _exponential(self, *what: str | int) -> float:
        return -math.log(self.uniform(*what))
