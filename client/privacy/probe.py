"""The probe: is the clipped sum what a loop over single records gives? Checked before every release.

At a process's first release of a kind all made-up batches are compared, in double; before each later one, a batch drawn by
lot, in float32, and all in double again where that leaves a doubt.

It runs on made-up records of the task's shape, never on the site's own, so that its outcome says
nothing about the data. The loop uses plain autograd, one record at a time, without padding and without
the engine's hooks. A difference means that the engine's gradients are not per record on this model, so
that a real record could count for more than the clipping norm: nothing is released.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from client.privacy.engine import ClippedSum, Clipping, Gradients, Objective
from client.privacy.randomness import Keystream
from shared.errors import SensitivityError

TOLERANCE = 1e-4  # relative; the sums are float32
ROUNDING = 1e-2  # relative: the most that float32 may differ where double agrees
SMALLEST = 1e-8  # of the largest norm: below it a gradient is nothing but rounding, in double too
DRAWN = 1.0  # deviation of a made-up B's values: a smaller one leaves A too little of the gradient to be seen
FLOOR = 1e-2  # of the whole gradient: a parameter with less is compared on this scale

Together = Sequence[tuple[Sequence[int], Objective]]


def check(
    module: nn.Module,
    gradients: Gradients,
    together: Together,
    alone: Sequence[Objective],
    *,
    whole: bool = False,
) -> None:
    """Compare the engine with the loop, and leave it at the first of its methods that agrees.

    Parameters
    ----------
    module
        The model's part that is trained. It computes in double meanwhile: float32 knows a sure prediction's gradient,
        the little that 1 - p leaves, to few digits, and would refuse a right engine.
    gradients
        The engine under test.
    together
        Batches: the numbers of the made-up records in each, and their losses. Each record is in one of them.
    alone
        The loss (1,) of each made-up record by itself, unpadded.
    whole
        Compare sums of single records' gradients, as discrete noise takes them.

    The clipping norm is half the smallest of the made-up records' own norms, so that every norm shows in the sum.
    Differences are measured beside what the records contribute one by one: contributions that cancel in the sum leave
    their rounding behind.

    Raises
    ------
    SensitivityError
        Naming the parameter that differs, or the record's contribution; where several methods were tried, by the first.
    """
    with _in_double(module):
        singles = []
        for objective in alone:
            with stateless(module):
                singles.append(gradients.alone(objective))
        refused: SensitivityError | None = None
        for method in gradients.methods:
            gradients.use(method)
            try:
                _compare(gradients, together, singles, every=True, whole=whole)
            except SensitivityError as error:
                refused = refused or error
            else:
                return
        assert refused is not None  # noqa: S101 - there is a method
        raise refused


def agrees(gradients: Gradients, together: Together, alone: Sequence[Objective], *, whole: bool = False) -> bool:
    """Whether the engine's method agrees with the loop in the model's own precision.

    Agreement in float32 is agreement; a small difference may be float32's own, and is for `check` to judge. The
    clipping norm is half the largest of the records' norms: a tiny gradient, known to few digits, stays tiny.

    Raises
    ------
    SensitivityError
        Where the difference is so large that gradients of float32 are mostly rounding under these arrays, which may
        depend on who shares a batch.
    """
    try:
        _compare(gradients, together, [gradients.alone(each) for each in alone], every=False, whole=whole)
    except Mismatch as error:
        if not error.gap <= ROUNDING:
            raise
        return False
    except SensitivityError:
        return False
    return True


class Mismatch(SensitivityError):
    """The engine and the loop differ, by `gap`."""

    def __init__(self, text: str, gap: float) -> None:
        super().__init__(text)
        self.gap = gap


@contextmanager
def stateless(module: nn.Module) -> Iterator[None]:
    """Refuse a model that keeps something of one pass for the next: a record would act where it is not drawn.

    Raises
    ------
    SensitivityError
        Where a buffer is another one afterwards.
    """
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    now = dict(module.named_buffers())
    for name in before.keys() | now.keys():
        if name not in before or name not in now or not torch.equal(before[name], now[name]):
            raise SensitivityError(
                f"the model keeps state from one batch to the next (buffer {name!r}); use another model."
            )


@contextmanager
def awake(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Give an adapter's B made-up values meanwhile, where it is zero and A is trained beside it.

    A run begins with B at zero, where A has no gradient: the probe would find nothing to compare, and the second step of
    the round would release gradients that no probe has seen.
    """
    asleep = [
        value
        for name, value in parameters.items()
        if ".lora_B." in name and name.replace(".lora_B.", ".lora_A.") in parameters and not value.any()
    ]
    with torch.no_grad():
        for value in asleep:
            drawn = torch.from_numpy(Keystream.from_system().normal(value.numel()))
            value.copy_(DRAWN * drawn.reshape(value.shape))
    try:
        yield
    finally:
        with torch.no_grad():
            for value in asleep:
                value.zero_()


def _compare(
    gradients: Gradients, together: Together, singles: Sequence[dict[str, torch.Tensor]], *, every: bool, whole: bool
) -> None:
    norms = torch.stack([torch.stack([part.norm() for part in single.values()]).norm() for single in singles])
    finite = norms[torch.isfinite(norms)]  # the engine counts the others as zero, and so does the loop
    if len(finite) and not float(finite.max()) > 0:
        raise SensitivityError(
            "the probe's made-up records have no gradient, so it can tell nothing; nothing is released."
        )
    clipping = Clipping(_half(finite, every=every) if len(finite) else 1.0)
    factors = clipping.factors(norms)
    total = ClippedSum(gradients, clipping, whole=whole)
    for numbers, objective in together:
        contributed = float(total.add(objective).max()) / clipping.norm
        if not contributed <= 1 + TOLERANCE:
            raise SensitivityError(
                f"the probe found a record that contributes {contributed:.4f} x the clipping norm; nothing is released."
            )
        if len(numbers) != objective.records:
            raise SensitivityError("the probe's batch has lost a record; nothing is released.")
    parts = {
        name: [single[name] * factor for single, factor in zip(singles, factors, strict=True) if factor > 0]
        for name in gradients.parameters
    }
    scales = {name: float(sum(part.norm() for part in each)) for name, each in parts.items()}
    # Beside each parameter's own gradients, so that a large one hides no small one; not below rounding's reach.
    least = max(FLOOR * max(scales.values()), 1e-12)
    gaps = {
        name: float((value - sum(parts[name], torch.zeros_like(value))).norm()) / max(scales[name], least)
        for name, value in total.sums().items()
    }
    worst = max(gaps, key=lambda name: gaps[name])
    if not max(gaps.values()) <= TOLERANCE:
        raise Mismatch(
            f"the probe found that the clipped sum of {worst!r} differs by {gaps[worst]:.2g} (limit {TOLERANCE:g}) from a loop "
            "over single records; nothing is released. Train another part of this model.",
            gaps[worst],
        )


def _half(norms: torch.Tensor, *, every: bool) -> float:
    """Half of the largest norm, or of the smallest, that `every` record be clipped; none that is zero but for rounding."""
    largest = float(norms.max())
    return float(norms[norms > SMALLEST * largest].min() if every else largest) / 2


def check_features(together: torch.Tensor, alone: torch.Tensor) -> None:
    """Compare features (N, H) of made-up records side by side with those of each by itself.

    Where a record's features depend on its neighbours (batch normalisation, say), neither a histogram of
    predictions nor a head trained on them has the sensitivity that the noise is made for.

    Raises
    ------
    SensitivityError
        Where they differ, or are not numbers.
    """
    gap = float(((together - alone).norm(dim=1) / alone.norm(dim=1).clamp_min(1e-12)).max())
    if not gap <= TOLERANCE:
        raise SensitivityError(
            f"the probe found that a record's features differ by {gap:.2g} (limit {TOLERANCE:g}) with the records beside it; "
            "nothing is released. Use another model."
        )


def check_losses(together: Sequence[Objective], alone: Sequence[Objective]) -> None:
    """Compare the losses of made-up units side by side with each one's by itself, in the model's own precision.

    A network whose outputs are not a record's own gives counts of no bounded sensitivity: as `check_features`, where there
    are no features.

    Raises
    ------
    SensitivityError
        Where they differ, or are not numbers.
    """
    side_by_side = torch.cat([objective.run() for objective in together])
    each = torch.cat([objective.run() for objective in alone])
    gap = float((side_by_side - each).abs().max() / each.abs().max().clamp_min(1e-12))
    if not gap <= TOLERANCE:
        raise SensitivityError(
            f"the probe found that a record's loss differs by {gap:.2g} (limit {TOLERANCE:g}) with the records beside it; "
            "nothing is released. Use another model."
        )


@contextmanager
def _in_double(module: nn.Module) -> Iterator[None]:
    """Widen float32 parameters and buffers, and narrow them again: both lose nothing."""
    module.double()
    try:
        yield
    finally:
        module.float()
