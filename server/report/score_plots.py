"""Scores on the public test set against rounds. Nothing private is in them, so they carry no noise."""

import math
from collections import defaultdict

from server.report import drawing
from server.report.drawing import SERIES, Plot
from server.report.facts import Facts
from server.report.words import score
from shared.score_names import telling, title

SHOWN = 3  # scores of at most 1


def test_scores(facts: Facts) -> Plot | None:
    """Draw the most telling scores of at most 1; None without a test set."""
    names = [name for name in telling({metric.name for _, metric in facts.metrics}) if name != "loss"]
    drawn = {name: values for name in names if (values := _values(facts, name)) and max(values.values()) <= 1}
    held = dict(list(drawn.items())[:SHOWN])
    if not held:
        return None
    figure, (axes,) = drawing.canvas()
    ends = []
    for (name, values), colour in zip(held.items(), SERIES, strict=False):
        drawing.line(axes, *drawing.arrays(values), colour)
        ends.append((drawing.last(values), f"{title(name)} {score(drawing.last(values))}", colour))
    drawing.against_rounds(axes, facts.rounds[-1].number)
    drawing.mark_phases(axes, facts.phases)
    axes.set_ylabel("score (of 1)")
    drawing.label_ends(axes, ends)
    said = ", ".join(f"{title(name)} {_course(values)}" for name, values in held.items())
    alt = f"Scores on the public test set, first round to last: {said}."
    return Plot(
        "scores",
        "Scores on the public test set",
        drawing.to_svg(figure, "scores", alt),
        alt,
        _test_sizes(facts),
    )


def test_loss(facts: Facts) -> Plot | None:
    """Draw the loss; None where it is missing or never finite."""
    values = _values(facts, "loss")
    if not values:
        return None
    figure, (axes,) = drawing.canvas()
    drawing.line(axes, *drawing.arrays(values), "purple")
    drawing.against_rounds(axes, facts.rounds[-1].number)
    drawing.mark_phases(axes, facts.phases)
    axes.set_ylabel("cross-entropy (nats)")
    drawing.label_ends(axes, [(drawing.last(values), f"loss {score(drawing.last(values))}", "purple")])
    alt = f"Loss on the public test set, first round to last: {_course(values)}."
    return Plot("loss", "Loss on the public test set", drawing.to_svg(figure, "loss", alt), alt)


def _values(facts: Facts, name: str) -> dict[int, float]:
    found: dict[int, float] = defaultdict(float)
    for number, metric in facts.metrics:
        if (metric.scope, metric.site, metric.name) == ("test", None, name) and math.isfinite(metric.value):
            found[number] = metric.value
    return dict(found)


def _course(values: dict[int, float]) -> str:
    first, last = values[min(values)], drawing.last(values)
    return score(last) if len(values) == 1 else f"{score(first)} to {score(last)}"


def _test_sizes(facts: Facts) -> str:
    sizes = [metric.value for _, metric in facts.metrics if (metric.scope, metric.name) == ("test", "records")]
    sizes = [each for each in sizes if math.isfinite(each)]
    other = max((each for each in sizes if each != sizes[-1]), default=None)
    if not sizes:
        return "The test set is public, so no noise is added to these scores."
    if other is None:
        return f"On {sizes[-1]:,.0f} public records; no noise is added to these scores."
    return f"The last round is scored on {sizes[-1]:,.0f} public records, others on {other:,.0f}. No noise is added to these scores."
