"""From the sites' updates to one: the fold that is a mean, and the rules that a hostile site moves less."""

from server.aggregation.fold import Fold, UpdateError
from server.aggregation.rules import Rule, chosen

__all__ = ["Fold", "Rule", "UpdateError", "chosen"]
