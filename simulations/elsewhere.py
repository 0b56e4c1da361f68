"""What other runs take of a virtual site's budget, so that its ledger says no before this run's end.

A site joins only where its budget carries the whole plan. What makes it run out on the way is another run's charge: one is
made here, by the ledger's own means, as large as it takes to leave a share of this run's plan.
"""

import hashlib
import math

from client.privacy.events import Question
from client.privacy.ledger import Ledger
from client.site import Site
from shared import accounting, plan
from shared.accounting import Release
from shared.run_config import RunConfig

RUN = "elsewhere"


def spend(ledger: Ledger, site: Site, config: RunConfig, run: str, share: float) -> None:
    """Leave `share` of what the site's training is planned to spend in `run`, once."""
    name = f"{RUN}-{run}"
    if ledger.run_releases(name, "train") or not math.isfinite(share):
        return
    budget = accounting.rdp_budget(ledger.max_epsilon, ledger.delta, ledger.order)
    releases = plan.make(config, site.dataset.card()).releases("train")
    left = share * math.fsum(ledger.price(release) for release in releases)
    taken = budget - ledger.spent("train") - left
    if not 0 < taken < math.inf:
        return
    # A Gaussian mechanism's divergence at an order is order / (2 sigma^2): Mironov 2017, "Renyi differential privacy".
    release = Release(1.0, math.sqrt(ledger.order / (2 * taken)), 1, "gaussian")
    digest = hashlib.sha256(name.encode()).hexdigest()
    ledger.charge(Question(name, f"{name}/1/train", digest, 1, "train", "train"), release, lambda *_: b"")
