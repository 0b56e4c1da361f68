"""One local evaluation: noised counts of how the model does on the site's validation records.

The task maps each record to a vector of bounded L2 norm (a one in the cell of its true and its predicted label, say). A
unit adds the mean of its records' vectors, clipped to the task's sensitivity, so that adding or removing it changes the
counts by at most that; noise of the plan's deviation times it goes on every cell, empty ones included. The vectors are
rounded towards zero to multiples of 1/1024, so that under `privacy.noise = "discrete"` whole numbers are released.
"""

import numpy as np
import numpy.typing as npt
import torch

from client.privacy import noise
from client.privacy.randomness import Keystream
from client.resident import Resident
from client.site import Site
from shared import arrays
from shared.arrays import Arrays
from shared.errors import EngineError
from shared.examples import Examples
from shared.messages import EvaluateRequest
from shared.plan import SitePlan
from shared.run_config import RunConfig
from shared.scoring import outcomes
from shared.tasks.base import Measured, Task

STEPS = 1024  # of an amount of 1


def evaluate(
    resident: Resident,
    site: Site,
    config: RunConfig,
    plan: SitePlan,
    request: EvaluateRequest,
    randomness: Keystream,
) -> Arrays:
    """Return {"counts": task.cells}, noised, float32."""
    model = resident.model(config, site.device)
    arrays.write(model.module, request.arrays)
    examples = resident.parts(site, config).validation
    held = None
    if model.task.features:
        held = resident.features(site, "validation", examples, config, request.arrays)
    total = np.zeros(int(np.prod(model.task.cells)), dtype=np.int64)
    weights = _weights(examples)
    for records, measured, _ in outcomes(model, examples, config.hardware, held):
        _add(total, measured, weights[records], model.task)
    kind = noise.of_counts(config.privacy, randomness, sensitivity=model.task.sensitivity, steps=STEPS)
    noised = kind.noised(torch.from_numpy(total), plan.evaluation_noise)
    return {"counts": noised.reshape(model.task.cells).numpy()}


def _weights(examples: Examples) -> npt.NDArray[np.float64]:
    """One over the number of records of each record's unit, (records,)."""
    of_unit = np.diff(np.searchsorted(examples.records, examples.units))
    weights: npt.NDArray[np.float64] = np.repeat(1 / of_unit, of_unit)
    return weights


def _add(total: npt.NDArray[np.int64], measured: Measured, weights: npt.NDArray[np.float64], task: Task) -> None:
    """Add records' clipped and weighted vectors to `total`, in steps.

    Raises
    ------
    EngineError
        Where a task names a cell of a record twice: its vector's norm would not be that of the amounts.
    """
    ordered = np.sort(measured.cells, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise EngineError(f"{task.name} names a cell of a record twice.")
    amounts = np.nan_to_num(measured.amounts, nan=0.0, posinf=0.0, neginf=0.0)
    norms = np.linalg.norm(amounts, axis=1)
    scales = np.minimum(1.0, task.sensitivity / np.maximum(norms, 1e-300)) * weights
    steps = np.trunc(amounts * scales[:, None] * STEPS).astype(np.int64)
    np.add.at(total, measured.cells.ravel(), steps.ravel())
