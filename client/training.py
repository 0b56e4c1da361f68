"""One local pass: from the global arrays to a noised update.

Each step draws its records by Poisson sampling at the plan's public rate, sums their clipped gradients,
adds noise, divides by the public expected batch, and moves the arrays. What comes out is the output of
`steps` Gaussian mechanisms and nothing else of the data. Where a phase is `proximal`, each step is pulled back towards the
arrays that the round began with (FedProx: Li et al. 2020, "Federated optimization in heterogeneous networks"). That term is
a function of the earlier steps' noised sums: it is added after clipping and noise, and changes neither the sensitivity nor
the cost. Inside the loss it would be a part of every record's gradient, and the clipping would shorten the records' own.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from client import made_up
from client.privacy import noise, probe
from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective, PlainSum, RoundedSum, train_only
from client.privacy.noise import Discrete, Noise
from client.privacy.randomness import Keystream
from client.resident import Resident
from client.site import Site
from shared import arrays, imbalance
from shared.accounting import Mechanism
from shared.arrays import Arrays
from shared.errors import EngineError, SensitivityError
from shared.examples import Examples, Unit, batches, collate
from shared.messages import TrainRequest
from shared.models import LoadedModel, autocast
from shared.plan import SitePlan
from shared.run_config import Gradients as Mode
from shared.run_config import Loss, RunConfig
from shared.tasks.base import Uniform, Width

log = logging.getLogger("moonflower.site")

SCALE = 2.0**10  # of losses in float16: divided out again by the clipping, which loses nothing of a power of two
HEAD_BATCH = 4096  # cached features side by side
FEW = 3  # rows of a made-up unit, the most
GRADIENT_BYTES = 2**31  # of per-record gradients side by side, where they are made whole: fewer records, if need be


@dataclass(frozen=True)
class Trained:
    """What one round's steps came to, and how it was had: for the reply, and for the run's statement."""

    update: Arrays  # released
    mechanism: Mechanism | Literal["none"]
    noise_source: noise.Source | Literal["none"]
    gradients: Mode | Literal["summed"]


class EncoderPass:
    """Losses by running the whole model on records.

    Where records are changed at random, by the numbers that `uniform` gives, so many copies of each are rows of its unit: their
    losses are averaged before the unit's one gradient is clipped. Under `hardware.precision = "float16"` the losses are `scale`
    times as large, because gradients on their way back through layers of 16 bits vanish below 6e-8. The scale is a public
    constant, the same for every record, and the clipping divides it out again.
    """

    loss = Loss()
    weights: Tensor | None = None  # of labels, as the request gives them

    def __init__(
        self, model: LoadedModel, examples: Examples, config: RunConfig, uniform: Uniform | None = None
    ) -> None:
        self.module: nn.Module = model.module
        self.scale = SCALE if config.hardware.precision == "float16" else 1.0
        self._copies = config.augmentation.multiplicity
        self._uniform = uniform if self._copies else None
        self._model, self._examples, self._config = model, examples, config
        self._device = model.module.device

    def groups(self, drawn: Sequence[Unit], *, whole: bool) -> Iterator[Objective]:
        """Split the drawn units into batches of one width, small where their gradients are made `whole`."""
        rows = self._config.hardware.micro_batch
        if whole:
            each = 4 * sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)
            rows = max(1, min(rows, GRADIENT_BYTES // each))
        drawn = [[row for row in unit for _ in range(self._copies or 1)] for unit in drawn]
        for group in batches(self._examples, drawn, rows):
            units = [drawn[place] for place in group]
            yield self._objective(self._examples, units, None, self._config.hardware.precision, self._uniform)

    def made_up(self, *, only_one_batch: bool = False) -> tuple[list[tuple[Sequence[int], Objective]], list[Objective]]:
        """Made-up units for the probe: padded side by side, and each alone; float32.

        All batches of `client.made_up` and one as wide as a record can be, or a short one, drawn by lot. Where a unit can
        have several rows, there is a batch of such units too.
        """
        chosen = [(1, [made_up.LENGTHS[number] for number in group], width) for group, width in made_up.TOGETHER]
        if self._rows() > 1:
            chosen += [(rows, list(each), width) for rows, each, width in made_up.SEVERAL if rows <= self._rows()]
        longest = made_up.longest(self._model)
        if only_one_batch or not longest:  # of several units: one alone shows nothing of what couples them
            chosen = [batch for batch in chosen if len(batch[1]) > batch[0]]
        if only_one_batch:
            chosen = [chosen[int(Keystream.from_system().uniform(1)[0] * len(chosen))]]
        elif longest:
            chosen.append((1, [longest, longest - 5], longest))
        lengths = [length for _, each, _ in chosen for length in each]
        with probe.stateless(self.module):
            examples = made_up.examples(self._model, lengths)
        padded = self._model.task.padded
        together: list[tuple[Sequence[int], Objective]] = []
        units: list[Unit] = []
        first = 0
        for rows, each, width in chosen:
            added = [range(row, row + rows) for row in range(first, first + len(each), rows)]
            first += len(each)
            numbers = range(len(units), len(units) + len(added))
            together.append((numbers, self._objective(examples, added, padded(width), "float32")))
            units.extend(added)
        return together, [self._alone(examples, unit, lengths) for unit in units]

    def _rows(self) -> int:
        """How many rows a unit can have in a step, for the probe: its engine sees them at once."""
        copies = max(1, self._config.augmentation.multiplicity)
        return FEW if self._model.task.chunks else self._config.privacy.records_per_unit * copies

    def _alone(self, examples: Examples, unit: Unit, lengths: Sequence[int]) -> Objective:
        """Loss (1,) of a unit by itself: the mean of its rows', each of them run alone and unpadded."""
        padded = self._model.task.padded
        rows = [self._objective(examples, [(row,)], padded(lengths[row]), "float32") for row in unit]
        return rows[0] if len(rows) == 1 else _mean(rows)

    def _objective(
        self,
        examples: Examples,
        units: Sequence[Unit],
        width: Width | None,
        precision: str,
        uniform: Uniform | None = None,
    ) -> Objective:
        batch = collate(examples, units, self._device, width, uniform)
        names, rows = list(batch), len(units[0])

        def losses(*values: Tensor) -> Tensor:
            given = dict(zip(names, values, strict=True))
            if rows > 1:
                given = {name: value.flatten(0, 1) for name, value in given.items()}
            with autocast(self._device, precision):
                outputs = self._model.outputs(given)
            each = self._model.task.objective(outputs, given, self.loss, self.weights)
            each = each * self.scale if precision == "float16" else each
            return each if rows == 1 else each.reshape(-1, rows).mean(1)

        return Objective(tuple(batch.values()), losses)


def _mean(rows: Sequence[Objective]) -> Objective:
    """Mean loss (1,) of objectives of one row each, run one after another."""

    def losses(_: Tensor) -> Tensor:
        return torch.stack([row.run() for row in rows]).mean(0)

    return Objective((rows[0].inputs[0],), losses)


class HeadPass:
    """Losses by running the head alone on features that no longer change; a unit has at most `rows` of them in a step."""

    loss = Loss()
    weights: Tensor | None = None  # of labels, as the request gives them
    scale = 1.0

    def __init__(self, model: LoadedModel, features: Tensor, examples: Examples, rows: int = 1) -> None:
        self._rows = rows
        self.module: nn.Module = model.module.head
        self._weight = model.module.head.weight
        self._task, self._features, self._examples = model.task, features, examples
        self._targets = model.task.targets_of(examples.fields, features.device)

    def groups(self, drawn: Sequence[Unit], *, whole: bool) -> Iterator[Objective]:  # noqa: ARG002 - as `EncoderPass`'s
        """Split the drawn units into batches of as many rows each; a head's gradients are small."""
        by_rows: dict[int, list[Unit]] = {}
        for unit in drawn:
            by_rows.setdefault(len(unit), []).append(unit)
        for each, units in sorted(by_rows.items()):
            for start in range(0, len(units), HEAD_BATCH):
                rows = torch.tensor(units[start : start + HEAD_BATCH], device=self._features.device)
                rows = rows.squeeze(1) if each == 1 else rows
                yield self._objective(self._features[rows], self._targets[rows])

    def made_up(self, *, only_one_batch: bool = False) -> tuple[list[tuple[Sequence[int], Objective]], list[Objective]]:  # noqa: ARG002
        """Made-up features for the probe: side by side, and each alone; and units of two rows and three, if units have so many."""
        counts = [1, 1, 1, 1, *(rows for rows in (2, 2, 3, 3) if rows <= self._rows)]
        width, ends = self._features.shape[1], list(accumulate(counts))
        drawn = Keystream.from_system().normal(ends[-1] * width).reshape(-1, width)
        features = torch.from_numpy(drawn).float().to(self._features.device)
        features[:4] *= torch.tensor([[1.0], [0.1], [10.0], [1.0]], device=features.device)
        with torch.no_grad():
            unlikely = self._task.unlikely(self.module(features), {})["labels"]  # as in `client.made_up`
        labels = torch.from_numpy(unlikely).to(features.device)
        rows = [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]
        together: list[tuple[Sequence[int], Objective]] = []
        for each in sorted(set(counts)):
            numbers = [number for number, count in enumerate(counts) if count == each]
            place = torch.tensor([rows[number] for number in numbers], device=features.device)
            place = place.squeeze(1) if each == 1 else place
            together.append((numbers, self._objective(features[place], labels[place])))
        single = [self._objective(features[n : n + 1], labels[n : n + 1]) for n in range(len(features))]
        return together, [single[unit[0]] if len(unit) == 1 else _mean([single[n] for n in unit]) for unit in rows]

    def _objective(self, features: Tensor, targets: Tensor) -> Objective:
        def losses(features: Tensor, targets: Tensor) -> Tensor:
            several = features.dim() > 2  # rows of a unit
            rows = features.shape[1] if several else 1
            given = (features.flatten(0, 1), targets.flatten(0, 1)) if several else (features, targets)
            logits = self.module(given[0].to(self._weight.dtype))
            each = self._task.objective(logits, {"labels": given[1]}, self.loss, self.weights)
            return each.reshape(-1, rows).mean(1) if several else each

        return Objective((features, targets), losses)


def train(
    resident: Resident,
    site: Site,
    config: RunConfig,
    plan: SitePlan,
    request: TrainRequest,
    randomness: Keystream,
) -> Trained:
    """Run one round's local steps and return the update of the phase's trainable arrays.

    Raises
    ------
    SensitivityError
        Where the probe finds that a record could exceed the clipping norm.
    EngineError
        Where the engine fails on the site's own records all the same.
    """
    name, phase, _ = config.place(request.round)
    steps = plan.phases[name]
    model = resident.model(config, site.device)
    arrays.write(model.parameters, request.arrays)
    trained = model.names(name)
    parameters = train_only(model.parameters, trained)
    examples = resident.parts(site, config).train
    if model.cached(trained):
        features = resident.features(site, "train", examples, config, request.arrays)
        objective: EncoderPass | HeadPass = HeadPass(model, features, examples, config.privacy.records_per_unit)
    else:
        objective = EncoderPass(model, examples, config, randomness.uniform)
    objective.loss = config.loss
    if request.weights:
        objective.weights = torch.tensor(request.weights[imbalance.WEIGHTS], device=model.module.device)
    bound = config.privacy.clipping
    clipping = None if bound == "none" else Clipping(phase.clipping_norm, bound, objective.scale)
    size = sum(value.numel() for value in parameters.values())
    noisy = noise.choose(
        config.privacy,
        phase.clipping_norm,
        size,
        randomness,
        model.module.device,
        allow_device_noise=site.privacy.allow_device_noise,
    )
    velocity: dict[str, Tensor] = {}
    with Gradients(objective.module, parameters, config.hardware.gradients) as gradients:
        whole = isinstance(noisy, Discrete)
        if clipping is not None:
            how = f"{config.hardware!r} {config.loss!r} {bool(request.weights)} {config.augmentation!r}"
            kind = f"{trained} {how} {whole} {config.privacy.records_per_unit}"
            if resident.probe_is_due(kind, request.arrays_digest):
                with probe.awake(parameters):
                    _probe(resident, objective, gradients, kind, whole=whole)
                resident.probed_from = f"{kind} {request.arrays_digest}"
            else:
                gradients.use(resident.probed[kind])
            whole = whole or gradients.method == "hooks"
        dropped = 0
        began = {name: value.detach().clone() for name, value in parameters.items()} if phase.proximal else {}
        for _ in range(steps.steps_per_round):
            total = _running_sum(gradients, clipping, noisy, objective.scale)
            drawn = [
                _some(examples, unit, config.privacy.records_per_unit, randomness)
                for unit in randomness.poisson_sample(len(examples), steps.sampling_rate).tolist()
            ]
            for batch in objective.groups(drawn, whole=whole):
                _add(total, batch)
            dropped += total.dropped
            with torch.no_grad():
                for parameter, summed in total.sums().items():  # which nobody reads again: it may be changed in place
                    step = noisy.noised(summed, steps.noise_multiplier)
                    if phase.proximal:  # of what earlier steps released alone: added now, it costs nothing
                        step.add_(parameters[parameter] - began[parameter], alpha=phase.proximal * steps.divisor)
                    if phase.momentum:
                        held = velocity.get(parameter)
                        step = velocity[parameter] = step if held is None else held.mul_(phase.momentum).add_(step)
                    parameters[parameter].sub_(step, alpha=phase.learning_rate / steps.divisor)
    if dropped:
        log.warning("%d records of round %d counted as zero: their gradients are not finite", dropped, request.round)
    update = arrays.difference(arrays.read(model.parameters, trained), request.arrays)
    private = steps.noise_multiplier > 0
    return Trained(
        update,
        noisy.mechanism if private else "none",
        noisy.source if private else "none",
        "summed" if clipping is None else gradients.method,
    )


def _running_sum(
    gradients: Gradients, clipping: Clipping | None, noisy: Noise, scale: float
) -> ClippedSum | RoundedSum | PlainSum:
    """Begin a step's sum: of bounded records, or, where the run promises nothing and asks for it, of unbounded ones."""
    if clipping is None:
        return PlainSum(gradients, scale)
    return (
        RoundedSum(gradients, clipping, noisy.grid) if isinstance(noisy, Discrete) else ClippedSum(gradients, clipping)
    )


def _some(examples: Examples, unit: int, most: int, randomness: Keystream) -> Unit:
    """Rows of a drawn unit that act in this step: of a person, those of at most `most` of its records.

    Which, is drawn from that person's records alone, and anew in each step: whatever they are, the person is one vector of
    bounded norm, and over the steps all its records are learnt from.
    """
    records = examples.records_of(unit)
    if len(records) <= most:
        return examples.rows_of(unit)
    some = np.sort(np.argsort(randomness.uniform(len(records)))[:most])
    return [row for record in some.tolist() for row in examples.of_record(records[record])]


def _add(total: ClippedSum | RoundedSum | PlainSum, batch: Objective) -> None:
    """Add the site's own records; where the engine fails on them though the probe passed, the reason stays at the site.

    Raises
    ------
    EngineError
        Whether and why it fails can depend on who was drawn: its text must not leave.
    """
    try:
        total.add(batch)
    except SensitivityError as error:
        raise EngineError(f"the engine failed on drawn records, after the probe had passed: {error}") from error


def _probe(
    resident: Resident, objective: EncoderPass | HeadPass, gradients: Gradients, key: str, *, whole: bool
) -> None:
    """Probe in full at a process's first release of its kind; after that, one batch in float32, and in full on any doubt.

    Raises
    ------
    SensitivityError
        Where no method agrees with the loop.
    """
    known = resident.probed.get(key)
    if known in gradients.methods:
        gradients.use(known)
        if probe.agrees(gradients, *objective.made_up(only_one_batch=True), whole=whole):
            return
    probe.check(objective.module, gradients, *objective.made_up(), whole=whole)
    resident.probed[key] = gradients.method
