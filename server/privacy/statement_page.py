"""A statement as JSON, as text for a terminal, and as a page that needs nothing else and prints well."""

import base64
import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.listing import clean
from server.privacy import claims
from server.privacy.records import Account, Statement
from server.report import words
from shared import __version__

FORMAT, VERSION = "moonflower-statement", 1
HERE = Path(__file__).parent
STYLE = HERE.parent / "report" / "report.css"


def verdict(statement: Statement) -> str:
    """One word for machines: "none", "study", "in doubt", "nothing recorded", "holds as recorded" or "holds".

    It holds as recorded where more may have been spent than was recorded (`Statement.uncounted`).
    """
    if not statement.private:
        return "none"
    if statement.study is not None:
        return "study"
    if statement.doubts or any(each.faults for each in statement.verifications):
        return "in doubt"
    if not statement.accounts:
        return "nothing recorded"
    return "holds as recorded" if statement.uncounted else "holds"


def as_json(statement: Statement) -> str:
    """Write it for machines; an infinite number is the text "Infinity"."""
    run, claimed = statement.run, statement.private and statement.study is None
    largest = statement.largest if claimed else None
    values = {
        "format": FORMAT,
        "version": VERSION,
        "made_at": statement.made_at.isoformat(),
        "moonflower": __version__,
        "run": {
            "id": run.id,
            "name": run.name,
            "status": run.status,
            "rounds": statement.rounds,
            "rounds_planned": run.rounds_planned,
            "config_digest": run.config_digest,
            "simulated": statement.simulated,
            "sweep": statement.study,
        },
        "guarantee": {
            "verdict": verdict(statement),
            "so_far": statement.so_far,
            "unit": claims.unit(statement),
            "neighbours": claims.neighbours(statement),
            "records_per_person": statement.records_per_person,
            "epsilon": (largest.epsilon if largest else 0.0) if claimed else None if statement.private else math.inf,
            "delta": statement.delta,
            "largest": [largest.site, largest.dataset, largest.part] if largest else None,
        },
        "accounts": [asdict(account) for account in statement.accounts],
        "doubts": statement.doubts,
        "uncounted": [asdict(each) for each in statement.uncounted],
        "notes": statement.notes,
        "verifications": [asdict(each) for each in statement.verifications],
        "mechanisms": claims.mechanisms(statement),
        "noise_sources": claims.sources(statement),
        "sampling": claims.sampling(statement),
        "accountant": claims.accountant(statement),
        "leaves_a_site": {"public": claims.public("public"), "released": claims.public("released")},
        "assumed": claims.assumed(statement),
        "not_covered": claims.not_covered(statement),
    }
    return json.dumps(_strict(values), indent=2, ensure_ascii=False)


def as_text(statement: Statement) -> str:
    """Write it for a terminal."""
    lines = [f"Privacy statement of run {statement.run.id} ({statement.run.name})", "", claim(statement)]
    lines += _listed("What stands against it", statement.doubts)
    lines += _listed("Not in these numbers", [each.text for each in statement.uncounted])
    for each in statement.verifications:
        found = f"{each.events} events, {each.of_this_run} of this run; lifetime epsilon {_up(each.lifetime_epsilon)} "
        found += f"at delta {each.delta:g} (Rényi order {each.order})"
        title = f"Ledger of {', '.join(each.sites) or each.dataset} ({each.source}): {found}"
        lines += _listed(title, [*(f"FAULT: {fault}" for fault in each.faults), *each.notes] or ["agrees."])
    if statement.private:
        lines += _listed("Accounts", [line for account in statement.accounts for line in _account(account)])
        lines += _listed("Unit", [f"{claims.unit(statement)}; neighbours: {claims.neighbours(statement)}."])
        lines += _listed("Mechanism", claims.mechanisms(statement)) + _listed("Noise", claims.sources(statement))
        lines += _listed("Sampling", claims.sampling(statement)) + _listed("Accountant", claims.accountant(statement))
        lines += _listed("Released", claims.RELEASED.values()) + _listed("Public", claims.PUBLIC.values())
        lines += _listed("Assumed", claims.assumed(statement))
        lines += _listed("Not covered", claims.not_covered(statement))
    lines += _listed("Notes", statement.notes)
    return "\n".join(clean(line) for line in lines)


def claim(statement: Statement) -> str:
    """One sentence: what the run guarantees."""
    said, largest = verdict(statement), statement.largest
    if said == "none":
        return "NO GUARANTEE: the run trained without privacy (epsilon inf). Nothing bounds what it gives away of a record."
    if said == "study":
        return (
            f"A STUDY, NO STATEMENT: the run is one of sweep {statement.study}. Choosing the best of several runs on the same data "
            "is not covered by the epsilon of one."
        )
    if said == "in doubt":
        return "NOT ESTABLISHED: what was recorded contradicts itself, as said below."
    if largest is None:
        return "No release is recorded." + (" What may have been charged is said below." if statement.uncounted else "")
    until = f" so far ({statement.rounds} of {statement.run.rounds_planned} rounds)" if statement.so_far else ""
    lost = f"ach {statement.unit} of each site lost at most epsilon {_up(largest.epsilon)} at delta {largest.delta:g}{until}"
    of = f"the largest account's, of site {largest.site}, {largest.part} {statement.unit}s."
    if statement.uncounted:
        return f"By the recorded releases, e{lost}: {of} What may have been charged besides is said below."
    return f"E{lost}: {of}"


def as_page(statement: Statement) -> str:
    """Write it as one HTML file."""
    css = STYLE.read_text(encoding="utf-8")
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: words.plain(value) if type(value) is str else value,
    )
    for name in ("epsilon", "budget", "number", "moment", "cut"):
        made.filters[name] = getattr(words, name)
    return made.get_template("statement.jinja").render(
        statement=statement,
        run=statement.run,
        verdict=verdict(statement),
        claims=claims,
        css=Markup(css),  # noqa: S704 - our own file
        css_digest=base64.b64encode(hashlib.sha256(css.encode()).digest()).decode(),
        version=__version__,
    )


def _account(account: Account) -> list[str]:
    seen = {None: "", True: ", confirmed by its ledger", False: ", CONTRADICTED by its ledger"}[account.verified]
    lines = [
        f"{account.site}, dataset {account.dataset}, {account.part} records: epsilon {_up(account.epsilon)} of "
        f"{account.budget:g} at delta {account.delta:g}{seen}"
    ]
    lines += [
        f"    rounds {sums.rounds}: {sums.steps} sums, {sums.mechanism}, noise multiplier {sums.noise_multiplier:g}, "
        f"sampling rate {sums.sampling_rate:g}" + (f", gradients {sums.gradients}" if sums.gradients else "")
        for sums in account.releases
    ]
    return lines


def _listed(title: str, lines: Any) -> list[str]:
    kept = list(lines)
    return ["", f"{title}:", *(f"  {line}" for line in kept)] if kept else []


def _up(epsilon: float) -> str:
    return words.epsilon(epsilon)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: _strict(each) for name, each in value.items()}
    return [_strict(each) for each in value] if isinstance(value, list | tuple) else value
