"""From the sites' updates to one: the fold that is a mean, and the rules that a hostile site moves less."""

from server.aggregation.fold import Fold, UpdateError

__all__ = ["Fold", "UpdateError"]
