"""What a site's reply must be before any of it is used, and what it says that the release has cost."""

import numpy as np
import numpy.typing as npt

from server.history.records import Metric, Spend
from shared import messages
from shared.messages import EvaluateReply, JoinReply, TrainReply
from shared.run_config import RunConfig
from shared.tasks.base import Task

LARGEST_NOISE = 1e9  # noise multiplier, far beyond any plan's: its square and sums of those are numbers


def at_odds(reply: TrainReply | EvaluateReply, joined: JoinReply, number: int) -> str | None:
    """Say what is wrong with a reply's public values."""
    if reply.site != joined.site or reply.round != number:
        return f"the reply is of site {reply.site[:64]!r} and round {reply.round}, not of {joined.site!r} and {number}."
    plausible = reply.epsilon >= 0 and 0 <= reply.noise_multiplier <= LARGEST_NOISE  # false for what is no number
    if isinstance(reply, TrainReply):
        plausible = plausible and 0 < reply.sampling_rate <= 1 and 1 <= reply.steps <= messages.LARGEST
    if not plausible:
        return "the reply's epsilon, noise multiplier, sampling rate or steps are no such values."
    return messages.implausible(reply)


def counts(reply: EvaluateReply, task: Task) -> npt.NDArray[np.float64] | None:
    """Return the reply's histogram, or None where it is another than was asked for."""
    held = reply.histogram.get("counts")
    if len(reply.histogram) != 1 or held is None or held.shape != task.cells:
        return None
    return held.astype(np.float64) if np.isfinite(held).all() else None


def validation(task: Task, histogram: npt.NDArray[np.float64], noise: float, site: str | None) -> list[Metric]:
    """Return the scores of a site's histogram; of the sum over sites where `site` is None.

    `noise` is relative to what one unit can move.
    """
    return [
        Metric("validation", site, score.name, score.value, score.low, score.high)
        for score in task.scores(histogram, noise * task.sensitivity)
    ]


def spend(reply: TrainReply | EvaluateReply, joined: JoinReply, config: RunConfig, number: int) -> Spend:
    """Return what a release has cost that came in round `number`, as the site reports it."""
    rate, steps, gradients = 1.0, 1, ""  # of a histogram, over all validation records
    if isinstance(reply, TrainReply):
        rate, steps, gradients = reply.sampling_rate, reply.steps, reply.gradients
    return Spend(
        site=joined.site,
        dataset=joined.dataset,
        part="train" if isinstance(reply, TrainReply) else "validation",
        epsilon=reply.epsilon,
        delta=config.privacy.delta,
        noise_multiplier=reply.noise_multiplier,
        sampling_rate=rate,
        steps=steps,
        budget=config.privacy.epsilon,
        mechanism=reply.mechanism,
        noise_source=reply.noise_source,
        gradients=gradients,
        ledger_id=reply.ledger_id,
        ledger_number=reply.ledger_number,
        ledger_head=reply.ledger_head,
        asked=None if reply.round == number else reply.round,
    )
