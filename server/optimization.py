"""The server's step: from the sites' mean update to the next global arrays.

All of it is post-processing of what the sites released, so it costs no privacy.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from server.aggregation import product
from server.aggregation.product import Pair
from shared.arrays import Arrays
from shared.errors import ModelError
from shared.run_config import Phase

if TYPE_CHECKING:
    from shared.models import LoadedModel

SECOND_MOMENT_DECAY = 0.99  # beta_2 of adam and yogi
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ServerState:
    """Everything that decides the rest of a run; a checkpoint holds it whole.

    `iterate` is what the sites train from; `published` what is scored and exported: the moving average
    of the iterates where the phase keeps one, else the iterate. `first` and `second` are the optimiser's moments
    over the phase's arrays, after `steps` steps of `phase`. `base` is the digest of the frozen part that the arrays
    belong to (`LoadedModel.base_digest`); empty where it was not recorded.
    """

    iterate: Arrays
    published: Arrays
    first: Arrays
    second: Arrays
    steps: int = 0
    phase: str = ""
    base: str = ""


def start(arrays: Arrays, base: str = "") -> ServerState:
    """State before the first round."""
    return ServerState(arrays, arrays, {}, {}, base=base)


def check_base(state: ServerState, model: "LoadedModel", name: str) -> None:
    """Refuse to put a state's arrays on another frozen part than the one they were trained on.

    Raises
    ------
    ModelError
        Where the model of this name is not what it was when the run began.
    """
    if state.base not in ("", model.base_digest):
        raise ModelError(
            f"model.name={name!r} is not the model that the run began with: the digest of its frozen weights is "
            f"{model.base_digest[:12]}… and was {state.base[:12]}…; put the model back as it was."
        )


def enter(state: ServerState, phase: str, names: tuple[str, ...]) -> ServerState:
    """Begin a phase, if it is another: from what the last one published, with fresh moments."""
    if state.phase == phase:
        return state
    zeros = {name: np.zeros_like(state.iterate[name]) for name in names}
    return ServerState(state.published, state.published, zeros, dict(zeros), 0, phase, state.base)


def step(
    state: ServerState, settings: Phase, update: Arrays, *, done: float = 0.0, pairs: Mapping[str, Pair] | None = None
) -> ServerState:
    """Move the iterate by the sites' mean update. The published average starts with the phase's first step.

    Parameters
    ----------
    done
        The share of the phase that lies behind, for the learning rate's schedule.
    pairs
        Which of the update's arrays are products, and of which factors (`server.aggregation.product`). Such a product is
        moved by the learning rate times its mean update, and split anew; nothing of it is remembered.
    """
    steps, rate = state.steps + 1, settings.server_learning_rate * schedule(settings, done)
    iterate, published = dict(state.iterate), dict(state.published)
    first, second = dict(state.first), dict(state.second)
    for name, delta in update.items():
        if pairs is not None and name in pairs:
            moved = product.moved(state.iterate, pairs[name], delta, rate)
            iterate |= moved
            published |= moved
            continue
        move, first[name], second[name] = _move(settings, delta, first[name], second[name], steps)
        iterate[name] = (iterate[name] + np.float32(rate) * move).astype(np.float32)
        # Weights of a moving average that starts now: equal at first, then `server_average` for the past.
        keep = np.float32(min(settings.server_average, 1 - 1 / steps))
        published[name] = (keep * published[name] + (1 - keep) * iterate[name]).astype(np.float32)
    return replace(state, iterate=iterate, published=published, first=first, second=second, steps=steps)


def _move(settings: Phase, delta: Values, first: Values, second: Values, steps: int) -> tuple[Values, Values, Values]:
    """Turn one array's mean update into a move of length 1 (times the learning rate), and both moments after it.

    `sgd` adds the update with heavy-ball momentum: FedAvg (McMahan et al. 2017) without, FedAvgM (Hsu et al. 2019,
    "Measuring the effects of non-identical data distribution for federated visual classification") with. The others divide by
    the root of a second moment: `adam`, `yogi` and `adagrad` of Reddi et al. 2021, "Adaptive federated optimization",
    algorithm 2, with moments that start at zero and, where they decay, Adam's correction for that (as optax does for Yogi).
    """
    decay, square = np.float32(settings.server_momentum), delta * delta
    if settings.server_optimizer == "sgd":
        first = decay * first + delta
        return first, first, second
    first = decay * first + (1 - decay) * delta
    spread, new = np.float32(1.0), np.float32(1 - SECOND_MOMENT_DECAY)
    match settings.server_optimizer:
        case "adagrad":
            second = second + square
        case "yogi":
            second = second - new * square * np.sign(second - square)
        case _:
            second = np.float32(SECOND_MOMENT_DECAY) * second + new * square
    if settings.server_optimizer != "adagrad":
        spread = np.float32(1 - SECOND_MOMENT_DECAY**steps)
    mean = first / np.float32(1 - settings.server_momentum**steps)
    return mean / (np.sqrt(second / spread) + np.float32(settings.server_adaptivity)), first, second


def schedule(settings: Phase, done: float) -> float:
    """Share of the learning rate after the share `done` of a phase: 1 for its first half, then falling to a tenth."""
    if settings.server_schedule == "constant":
        return 1.0
    return min(1.0, max(0.1, 2 * (1 - done) * 0.9 + 0.1))
