"""The page: facts in, one HTML file out.

Jinja2 escapes every value, and `plain` takes out what would not print: names, errors and configurations
were written by others. The page's own policy lets it load nothing and run nothing, and admits one style
sheet, by its digest.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from server.history.records import Metric
from server.report import plots, words
from server.report.facts import Facts, sample
from server.report.privacy import privacy
from server.report.sites import accounts, sites, traffic, troubles
from shared import __version__
from shared.score_names import telling, title

HERE = Path(__file__).parent
ROWS = 400  # of a table of rounds; a longer run shows rounds evenly spread
LINES = 100  # of troubles and of events
TILES = 3  # scores on the test set that stand at the top, beside the loss
BASELINES = ("majority_accuracy", "majority_baseline", "majority")


def render(facts: Facts, *, now: datetime | None = None) -> str:
    """Write a run's page; `now` is the time on it, the present unless a test says otherwise."""
    held, moved = accounts(facts.spends), traffic(facts)
    claim = privacy(facts, held)
    css = (HERE / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    found = troubles(facts)
    shown = set(sample([each.number for each in facts.rounds], ROWS))
    test_round, by_name = _last_scores(facts, "test")
    validated = facts.validated
    return (
        _environment()
        .get_template("report.jinja")
        .render(
            run=facts.run,
            facts=facts,
            privacy=claim,
            tiles=_tiles(by_name),
            baseline=next((by_name[name] for name in BASELINES if name in by_name), None),
            test_round=test_round,
            pooled=_last_scores(facts, "validation")[1].get(validated),
            validated=title(validated),
            tested=title(facts.tested),
            attempts=Counter(attempt.outcome or "running" for attempt in facts.attempts),
            plots=plots.plots(facts, moved, private=claim.private),
            sites=sites(facts, held),
            traffic=moved,
            down=sum(each.down for each in moved.values()),
            up=sum(each.up for each in moved.values()),
            seconds=sum(each.seconds for each in facts.rounds),
            rounds=[each for each in facts.rounds if each.number in shown],
            scores=_scores_by_round(facts),
            troubles=found[:LINES],
            troubles_left=len(found[LINES:]),
            events=facts.events[-LINES:],
            events_left=len(facts.events[:-LINES]),
            config=json.dumps(facts.run.config, indent=2, ensure_ascii=False),
            css=Markup(css),  # noqa: S704 - our own file
            css_digest=digest,
            now=now or datetime.now(UTC),
            version=__version__,
        )
    )


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: words.plain(value) if type(value) is str else value,
    )
    for name in ("epsilon", "budget", "number", "score", "size", "duration", "moment", "cut"):
        made.filters[name] = getattr(words, name)
    made.globals |= {"count": words.count, "unknown": words.UNKNOWN, "inf": float("inf")}
    return made


def _last_scores(facts: Facts, scope: str) -> tuple[int, dict[str, Metric]]:
    """Return the last round with scores over all sites, and these by name."""
    found: dict[int, dict[str, Metric]] = {}
    for number, metric in facts.metrics:
        if metric.scope == scope and metric.site is None:
            found.setdefault(number, {})[metric.name] = metric
    return (max(found), found[max(found)]) if found else (0, {})


def _tiles(scores: dict[str, Metric]) -> list[tuple[str, Metric]]:
    return [(f"Test {title(name)}", scores[name]) for name in _shown(scores)]


def _shown(names: Iterable[str]) -> list[str]:
    """Names of the scores that stand at the top, the loss at the end."""
    held = [name for name in names if name not in BASELINES]
    return [*[name for name in telling(held) if name != "loss"][:TILES], *[name for name in held if name == "loss"]]


def _scores_by_round(facts: Facts) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for number, metric in facts.metrics:
        if metric.site is None:
            found.setdefault(number, {})[f"{metric.scope}_{metric.name}"] = metric.value
    return found
