"""What a site may have charged in a run and the history does not have.

A site charges an answer before it sends it. What never arrived, or was not taken, contradicts nothing that was recorded,
and may have been spent all the same: a statement says it beside its numbers, until the site's ledger counts it.
"""

from collections import defaultdict
from collections.abc import Iterable

from server.history.records import Kind
from server.privacy.records import KINDS, PARTS, Recorded, Uncounted, ranges


def find(recorded: Recorded) -> list[Uncounted]:
    """Find all of it that the history shows."""
    return [*_unanswered(recorded), *_unseen(recorded)]


def _unanswered(recorded: Recorded) -> list[Uncounted]:
    """Name requests that a site may have charged after its last recorded release of that part.

    Only these: a release recorded later comes with the site's own epsilon, in which an earlier charge shows.
    """
    last: dict[tuple[str, Kind], int] = {}
    for number, spend in recorded.spends:
        last[spend.site, KINDS[spend.part]] = max(number, last.get((spend.site, KINDS[spend.part]), 0))
    lost: dict[tuple[str, Kind], dict[int, str]] = defaultdict(dict)
    for number, kind, site in _asked_before(recorded):
        lost[site, kind][number] = "asked by an attempt that was lost"
    for number, part in recorded.participations:
        if part.kind in PARTS and part.outcome == "pending":
            lost[part.site, part.kind].setdefault(number, "at work when the round ended")
        if part.kind in PARTS and part.outcome in ("timeout", "failed"):
            lost[part.site, part.kind][number] = f"{part.outcome}: {part.error or 'no reason was given'}"
    lines = []
    for (site, kind), why in sorted(lost.items()):
        after = [number for number in why if number > last.get((site, kind), 0)]
        if after:
            lines.append(
                Uncounted(
                    site,
                    f"site {site} may have charged {kind} of round{'s' if len(after) > 1 else ''} {ranges(after)}, of which "
                    f"no answer counts ({why[max(after)].rstrip('.')}); it is not in these numbers, and its ledger (--verify) tells.",
                )
            )
    return lines


def _asked_before(recorded: Recorded) -> Iterable[tuple[int, Kind, str]]:
    """Give what an attempt that committed no more may have asked of the sites that it had had answers from."""
    attempt = 1
    for done in recorded.rounds:
        if done.attempt != attempt:
            attempt = done.attempt
            kinds = {part.kind for number, part in recorded.participations if number == done.number} & PARTS.keys()
            sites = {part.site for number, part in recorded.participations if number < done.number}
            yield from ((done.number, kind, site) for kind in kinds for site in sites)


def _unseen(recorded: Recorded) -> list[Uncounted]:
    """Name ledgers that are further than their last committed release: what lies between may be of this run.

    A later run moves them on too. Where no attempt of this one was lost, it has left nothing between. Where one was, a site
    that joined it may have been charged since, however far its ledger was then.
    """
    run, newest = recorded.run, dict[str, int]()
    for _, spend in recorded.spends:
        newest[spend.ledger_id] = max(spend.ledger_number, newest.get(spend.ledger_id, 0))
    finished = run.status == "completed" and len(recorded.attempts) == 1
    asked = {part.site for _, part in recorded.participations}
    lines = []
    for seen in recorded.ledgers.values():
        known = newest.get(seen.id)
        joined_only = known is None and len(recorded.attempts) > 1
        if known == 0 or (
            seen.number <= (known or 0) and not joined_only
        ):  # recorded before numbers were, or no further
            continue
        if finished and known is None and seen.site in asked:  # what became of each request is recorded
            continue
        if seen.run == run.id or (known and not finished):
            by = "" if seen.run == run.id else f" by run {seen.run}"
            held = f"its last committed release is event {known}" if known else "no release of it is recorded"
            lines.append(
                Uncounted(
                    seen.site,
                    f"site {seen.site}: its ledger was seen at event {seen.number}{by}, and {held}. What it may have answered "
                    "to a round that was not committed is not in these numbers; its ledger (--verify) has it.",
                )
            )
    if run.status != "completed":
        lines.append(
            Uncounted("", "A round under way may have been charged at the sites, and is not in these numbers.")
        )
    return lines
