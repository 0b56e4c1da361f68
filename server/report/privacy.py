"""What a run's history lets one claim about privacy, and what in it speaks against the claim.

The unit is one record of a site's dataset, or one person with all their records, under add-or-remove-one neighbours.
Figures are per site: training and validation units are disjoint, so the two parts compose in parallel, and so do sites that
share none; nothing is ever summed. A doubt is a line in the history that the claim cannot stand
beside, such as a release without a recorded spend; the page shows it in place of the claim.
"""

import math
from dataclasses import dataclass

from server.history.records import Kind, Part, Spend
from server.privacy.records import unit_of
from server.report.check import Check, check
from server.report.facts import Facts
from server.report.sites import PARTS, Accounts
from server.report.words import budget, cut, epsilon
from shared.run_config import PrivacyUnit

CHARGED: dict[Kind, Part] = {"train": "train", "evaluate": "validation"}
SHOWN = 12  # doubts of one kind named one by one


@dataclass(frozen=True)
class Privacy:
    """The claim: `largest` bounds what a unit of any one site lost, where `private` and no doubts."""

    private: bool
    unit: PrivacyUnit
    planned: float | None  # the run's epsilon, as configured
    largest: Spend | None  # over sites and parts; None before the first release
    by_part: dict[Part, Spend]
    delta: float | None  # the largest
    doubts: tuple[str, ...]
    check: Check | None  # None without privacy
    unanswered: int  # requests without an answer, which the site may have charged all the same
    simulated: bool
    continuous: bool  # whether a release had continuous noise
    device_noise: bool  # whether a release's noise came from an accelerator's own generator


def privacy(facts: Facts, found: Accounts) -> Privacy:
    """Read the claim and the doubts off a run's history and its accounts."""
    by_part = {
        part: max((each.spend for each in held), key=lambda spend: _order(spend.epsilon))
        for part in PARTS
        if (held := [account for key, account in found.items() if key[2] == part])
    }
    planned = _planned(facts)
    private = facts.run.private and planned != math.inf
    checked = check(found) if private else None
    doubts = (
        [*_unbounded(found), *_overspent(found), *_unrecorded(facts), *_some(list(checked.doubts))] if checked else []
    )
    return Privacy(
        private=private,
        unit=unit_of(facts.run),
        planned=planned,
        largest=max(by_part.values(), key=lambda spend: _order(spend.epsilon), default=None),
        by_part=by_part,
        delta=max((spend.delta for _, spend in facts.spends), default=None),
        doubts=tuple(doubts),
        check=checked,
        unanswered=sum(part.outcome in ("failed", "timeout") for _, part in facts.participations),
        simulated=any(attempt.engine == "in-process" for attempt in facts.attempts),
        continuous=any(spend.mechanism == "gaussian" for _, spend in facts.spends),
        device_noise=any(spend.noise_source == "device" for _, spend in facts.spends),
    )


def _planned(facts: Facts) -> float | None:
    section = facts.run.config.get("privacy")
    try:
        return float(section["epsilon"]) if isinstance(section, dict) else None
    except (KeyError, TypeError, ValueError):
        return None


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _unbounded(found: Accounts) -> list[str]:
    lines = []
    for (site, _, part), account in found.items():
        spend = account.spend
        if not math.isfinite(spend.epsilon):
            lines.append(
                f"Site {cut(site, 80)} reports no finite ε for its {part} records: nothing bounds what they lost."
            )
        elif any(not release.noise_multiplier > 0 for release in account.releases):
            lines.append(
                f"Site {cut(site, 80)} released a sum of its {part} records without noise, and yet reports ε = {epsilon(spend.epsilon)}."
            )
    return _some(lines)


def _overspent(found: Accounts) -> list[str]:
    return _some(
        [
            f"Site {cut(site, 80)} reports ε = {epsilon(account.spend.epsilon)} for its {part} records, above the {budget(account.spend.budget)} planned."
            for (site, _, part), account in found.items()
            if math.isfinite(account.spend.epsilon) and account.spend.epsilon > account.spend.budget * (1 + 1e-9)
        ]
    )


def _unrecorded(facts: Facts) -> list[str]:
    charged = {(number, spend.site, spend.part) for number, spend in facts.spends}
    return _some(
        [
            f"Site {cut(part.site, 80)} answered in round {number} ({part.kind}), and no spend is recorded for it."
            for number, part in facts.participations
            if part.outcome == "ok" and part.kind in CHARGED and (number, part.site, CHARGED[part.kind]) not in charged
        ]
    )


def _some(lines: list[str]) -> list[str]:
    left = len(lines) - SHOWN
    return lines if left <= 1 else [*lines[:SHOWN], f"... and {left} more of this kind."]
