"""Whether what is asked fits into an account beside what is spent and what rounds under way have reserved.

Reading and deciding are under the ledger's write lock where a spend or a reservation follows.
"""

import math
from collections.abc import Iterable

from client.privacy.account import Account
from client.privacy.events import Part
from shared import accounting
from shared.accounting import Release
from shared.errors import BudgetError, PolicyError

Key = tuple[str, str]  # run and name of the question that asks: its own reservation does not count


def refuse_beyond_budget(
    account: Account,
    max_epsilon: float,
    releases: Iterable[Release],
    part: Part,
    what: str,
    allow_unbounded: bool,
    key: Key | None = None,
) -> None:
    """Refuse releases that the Rényi filter does not let pass; `what` names them in the refusal.

    Raises
    ------
    PolicyError
        Where a promise would end, or has ended, by a release without noise, and the site does not allow it.
    BudgetError
        Where they take the lifetime epsilon of the part above `max_epsilon`.
    """
    price = math.fsum(account.price(release) for release in releases)
    spent, reserved = account.spent(part), _reserved_by_others(account, part, key)
    where = f"of dataset {account.dataset!r}, part {part!r},"
    if math.isinf(price) or math.isinf(spent):
        if allow_unbounded:
            return
        reason = (
            f"A release without noise was charged before: the promise {where} is gone for ever"
            if math.isinf(spent)
            else f"{what} has no noise: the epsilon {where} would be inf for ever"
        )
        raise PolicyError(f"{reason} (site.toml, [privacy] allow_non_private).")
    budget = accounting.rdp_budget(max_epsilon, account.delta, account.order)
    if spent + reserved + price > budget:
        total = spent + reserved + price
        now, then = (accounting.rdp_to_epsilon(r, account.order, account.delta) for r in (spent, total))
        others = f" and {reserved:.4g} reserved by rounds under way" if reserved else ""
        raise BudgetError(
            f"{what} would take the lifetime epsilon {where} from {now:.3f} to {then:.3f}, above the "
            f"limit of {max_epsilon:g} at delta={account.delta:g} (site.toml, [privacy] max_epsilon). "
            f"In the Rényi filter of order {account.order}, {spent:.4g} is spent{others}, {price:.4g} asked and "
            f"{max(budget - spent - reserved, 0.0):.4g} left."
        )


def refuse_beyond_releases(account: Account, max_releases: int | None, asked: int, what: str, key: Key | None) -> None:
    """Raise BudgetError unless that many more replies may be charged, beside those that others are computing."""
    if max_releases is None:
        return
    spent = len(account.spends())
    under_way = {(held.question.run, held.question.name) for held in account.reservations()} - {key}
    if spent + len(under_way) + asked > max_releases:
        others = f" and {len(under_way)} under way" if under_way else ""
        raise BudgetError(
            f"{what} would add {asked} to the {spent} releases of dataset {account.dataset!r} that were charged{others}, "
            f"above the limit of {max_releases} for its whole life (site.toml, [privacy] max_releases)."
        )


def _reserved_by_others(account: Account, part: Part, key: Key | None) -> float:
    """Sum the open reservations of other questions: the dearest of each, for one answer only can be charged.

    What has no noise is left out: the site has allowed it, and until it is charged the limit holds for the rest.
    """
    dearest: dict[tuple[str, str], float] = {}
    for held in account.reservations():
        asked = (held.question.run, held.question.name)
        price = account.price(held.release)
        if held.question.part == part and asked != key and math.isfinite(price):
            dearest[asked] = max(price, dearest.get(asked, 0.0))
    return math.fsum(dearest.values())
