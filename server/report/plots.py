"""The plots of a report, in the order in which a reader wants them."""

from collections.abc import Mapping

from server.report import drawing
from server.report.drawing import Plot
from server.report.epsilon_plot import epsilons
from server.report.facts import Facts
from server.report.round_plots import seconds, transfer
from server.report.score_plots import test_loss, test_scores
from server.report.sites import Traffic
from server.report.validation_plot import validation


def plots(facts: Facts, traffic: Mapping[int, Traffic], *, private: bool) -> list[Plot]:
    """Draw all plots that the run has data for; one without privacy has no plot of epsilon."""
    if not facts.rounds:
        return []
    with drawing.style():
        drawn = [
            test_scores(facts),
            test_loss(facts),
            validation(facts),
            epsilons(facts) if private else None,
            seconds(facts, traffic),
            transfer(facts, traffic),
        ]
    return [plot for plot in drawn if plot is not None]
