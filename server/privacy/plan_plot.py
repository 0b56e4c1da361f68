"""A plan as a picture: epsilon by rounds, and the noise that each epsilon leaves in the averaged gradient.

The noise is that of one coordinate, over the clipping norm.
"""

from collections.abc import Sequence
from pathlib import Path

from server.privacy.planning import Planned, Reached
from server.report import drawing
from server.report.drawing import COLOURS
from shared.errors import ConfigError


def write(curve: Sequence[Reached], planned: Planned, path: Path) -> None:
    """Draw the plan into an .svg or .png file; an older file is replaced."""
    with drawing.style():
        figure, (spent, noise) = drawing.canvas(1, 2)
        rounds = [point.round for point in curve]
        spent.plot(rounds, [point.epsilon_train for point in curve], color=COLOURS["blue"])
        spent.plot(rounds, [point.epsilon_validation for point in curve], color=COLOURS["vermilion"])
        drawing.against_rounds(spent, planned.rounds)
        spent.set_ylim(0, 1.14 * planned.epsilon)
        spent.axhline(planned.epsilon, color=COLOURS["ink"], linestyle=(0, (5, 3)), linewidth=1)
        spent.set_title(f"ε by rounds, site {planned.site}", color=COLOURS["ink"])
        for height, text, colour in ((0.12, "train", "blue"), (0.03, "validation", "vermilion")):
            spent.text(0.97, height, text, transform=spent.transAxes, ha="right", color=COLOURS[colour])
        noise.plot(
            [trade.epsilon for trade in planned.trades],
            [trade.noise_per_coordinate for trade in planned.trades],
            color=COLOURS["green"],
            marker="o",
            markersize=3.5,
        )
        noise.set_xlim(0, 1.05 * max(trade.epsilon for trade in planned.trades))
        noise.set_ylim(0, None)
        noise.set_xlabel("ε of the run")
        noise.set_title("noise per coordinate", color=COLOURS["ink"])
        dates = {"Date": None} if path.suffix == ".svg" else None
        try:
            figure.savefig(path, format=path.suffix[1:], facecolor="white", dpi=144, metadata=dates)
        except OSError as error:
            raise ConfigError(f"--plot {path} cannot be written: {error.strerror}.") from None
