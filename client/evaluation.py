"""One local evaluation: noised counts of how the model does on the site's validation records.

The task maps each record to a vector of bounded L2 norm (a one in the cell of its true and its predicted label, say). A
unit adds the mean of its records' vectors, each clipped to the task's sensitivity, so that adding or removing it changes the
counts by at most that; noise of the plan's deviation times it goes on every cell, empty ones included. Of a person all
records count: however many they are, their shares add up to one. The vectors are rounded towards zero to multiples of
2**-16, so that under `privacy.noise = "discrete"` whole numbers are released.
"""

import numpy as np
import numpy.typing as npt
import torch

from client import made_up
from client.privacy import noise, probe
from client.privacy.randomness import Keystream
from client.resident import Resident
from client.site import Site
from client.training import EncoderPass
from shared import arrays
from shared.arrays import Arrays
from shared.errors import EngineError
from shared.examples import Examples
from shared.messages import EvaluateRequest
from shared.models import LoadedModel
from shared.plan import SitePlan
from shared.run_config import RunConfig
from shared.scoring import outcomes
from shared.tasks.base import Measured, Task

STEPS = 1 << 16  # of an amount of 1


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
    arrays.write(model.parameters, request.arrays)
    examples = resident.parts(site, config).validation
    held = None
    if model.task.features:
        held = resident.features(site, "validation", examples, config, request.arrays)
    else:
        _probe(resident, model, config, request.arrays_digest)
    total = np.zeros(int(np.prod(model.task.cells)), dtype=np.int64)
    shares = _shares(examples)
    for records, measured, _ in outcomes(model, examples, config.hardware, held):
        _add(total, measured, shares[records], model.task)
    kind = noise.of_counts(config.privacy, randomness, sensitivity=model.task.sensitivity, steps=STEPS)
    noised = kind.noised(torch.from_numpy(total), plan.evaluation_noise)
    return {"counts": noised.reshape(model.task.cells).numpy()}


def _probe(resident: Resident, model: LoadedModel, config: RunConfig, arrays: str) -> None:
    """Refuse a network that scores a record by its neighbours too; in full at a process's first, then a batch by lot.

    Where features are kept, they are probed as they are made.

    Raises
    ------
    SensitivityError
        Where they differ.
    """
    kind = f"evaluation {config.hardware.precision} {config.privacy.records_per_unit}"
    if not resident.probe_is_due(kind, arrays):
        return
    made = EncoderPass(model, made_up.examples(model), config)
    together, alone = made.made_up(only_one_batch=kind in resident.scored)
    with torch.no_grad():
        probe.check_losses([batch for _, batch in together], alone)
    resident.scored.add(kind)
    resident.probed_from = f"{kind} {arrays}"


def _shares(examples: Examples) -> npt.NDArray[np.int64]:
    """Steps of each record (records,): those of a unit's records add up to an amount of 1, whatever their number."""
    found: list[npt.NDArray[np.int64]] = [np.zeros(0, dtype=np.int64)]
    for held in np.diff(np.searchsorted(examples.records, examples.units)).tolist():
        found.append(np.diff(np.arange(held + 1) * STEPS // held))
    return np.concatenate(found)


def _add(total: npt.NDArray[np.int64], measured: Measured, shares: npt.NDArray[np.int64], task: Task) -> None:
    """Add records' vectors to `total`, in steps: each clipped, and weighted by its share.

    Raises
    ------
    EngineError
        Where a task's vectors are not one a record of different cells of its counts: their norm would not be that of the
        amounts.
    """
    cells, amounts = measured.cells, measured.amounts
    if cells.shape != amounts.shape or cells.ndim != 2 or len(cells) != len(shares):
        raise EngineError(
            f"{task.name} measures {len(shares)} records in cells {cells.shape}, amounts {amounts.shape}."
        )
    ordered = np.sort(cells, axis=1)
    if cells.size and not 0 <= ordered.min() <= ordered.max() < len(total):
        raise EngineError(f"{task.name} names a cell that its counts do not have.")
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise EngineError(f"{task.name} names a cell of a record twice.")
    most = task.sensitivity
    amounts = np.clip(np.nan_to_num(amounts, nan=0.0, posinf=0.0, neginf=0.0), -most, most)  # else a square may be inf
    norms = np.linalg.norm(amounts, axis=1)
    scales = np.minimum(1.0, most / np.maximum(norms, 1e-300)) * shares
    np.add.at(total, cells.ravel(), np.trunc(amounts * scales[:, None]).astype(np.int64).ravel())
