"""The one place that adds noise to a sum: continuous or discrete Gaussian, and whose random numbers it takes.

Each kind turns the sum of vectors of bounded norm into one release of a Gaussian mechanism: noise of
`noise_multiplier` times the sensitivity on every coordinate. Whatever is done with the result is
post-processing.

- `Continuous`: float64 normals from the site's keystream. The lowest bits of a float sum are not covered.
- `Discrete`: sums of whole numbers and whole-number noise from the keystream; exact, and nothing to tell
  from lowest bits.
- `OnDevice`: the accelerator's own generator, where the site's policy allows it.
"""

import math
import os
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from client.privacy.discrete_gaussian import sampler
from client.privacy.randomness import Keystream
from shared.accounting import Mechanism
from shared.errors import ConfigError
from shared.run_config import Privacy

Source = Literal["aes-256-ctr", "device"]

_LARGEST_SUM = 2**62  # whole numbers: noise on top of it cannot pass 2**63
_LARGEST_STEPS = 2.0**31  # of one rounded vector, which is held in 32 bits before it is summed
_NOISED = 1 << 20  # values that are noised together
_IN_CACHE, _SIDE_BY_SIDE = 1 << 16, 1 << 24  # values that are rounded together: on a CPU, on an accelerator


@dataclass(frozen=True)
class Grid:
    """The public grid of whole multiples of `step` on which records' vectors are rounded.

    Attributes
    ----------
    step
        gamma: a step of the grid, in the unit of what is summed.
    sensitivity
        The largest L2 norm of a rounded vector, in steps: by it one record moves the sum.
    """

    step: float
    sensitivity: float

    @classmethod
    def of(cls, clipping_norm: float, parameters: int, share: float) -> "Grid":
        """Grid for vectors of `parameters` coordinates, clipped to `clipping_norm` C.

        The step is gamma = share x C / sqrt(d). Rounding to the nearest moves each of the d coordinates by at
        most gamma / 2, and the vector by gamma sqrt(d) / 2: the sensitivity C + gamma sqrt(d) / 2 is
        C (1 + share / 2) in any dimension. `parameters` counts all that the phase trains: public.

        Raises
        ------
        ConfigError
            If the grid is so fine that a rounded vector would pass 2**31 steps.
        """
        root = math.sqrt(parameters)
        if (sensitivity := root * (1 / share + 0.5)) >= _LARGEST_STEPS:
            raise ConfigError(
                f"privacy.grid={share:g} makes {sensitivity:.3g} steps of a gradient of {parameters} values, above the "
                f"{_LARGEST_STEPS:.3g} that can be held; raise it to {2 * root / _LARGEST_STEPS:.1g}."
            )
        return cls(share * clipping_norm / root, sensitivity)

    def rounded_sum(self, samples: Tensor, factors: Tensor) -> Tensor:
        """Round each record's scaled vector to the grid, and sum them: int64, shape (*shape), in steps.

        Sums of whole numbers are the same in any order and any micro-batch: add them up as they come.

        Parameters
        ----------
        samples
            (records, *shape): each record's gradient of one parameter, float32, not yet clipped.
        factors
            (records,): its scale; a record of scale 0 counts as zero, be its gradient finite or not.
        """
        rows = samples.flatten(1)
        total = torch.zeros(rows.shape[1], dtype=torch.int64, device=samples.device)
        scales = (factors / self.step).unsqueeze(1)
        values = (_IN_CACHE if rows.device.type == "cpu" else _SIDE_BY_SIDE) // max(1, len(rows)) + 1
        for start in range(0, len(total), values):
            some = rows[:, start : start + values]
            steps = torch.where(scales > 0, some * scales, 0.0).round_().to(torch.int32)
            total[start : start + values] = steps.sum(0, dtype=torch.int64)
        return total.view(samples.shape[1:])


@dataclass(frozen=True)
class Continuous:
    """Real-valued Gaussian noise in float64, for sums of vectors of norm at most `sensitivity`."""

    sensitivity: float
    randomness: Keystream
    mechanism: ClassVar[Mechanism] = "gaussian"
    source: ClassVar[Source] = "aes-256-ctr"

    def noised(self, total: Tensor, noise_multiplier: float) -> Tensor:
        """Return the noised sum in float32, on the sum's device; without noise where the multiplier is 0."""
        if noise_multiplier == 0:
            return total.float()
        values = total.flatten().cpu()
        noised = torch.empty(len(values))
        for start in range(0, len(values), _NOISED):  # doubles of a whole embedding would take much memory
            part = values[start : start + _NOISED]
            noise = torch.from_numpy(self.randomness.normal(len(part)))
            noised[start : start + _NOISED] = noise.mul_(noise_multiplier * self.sensitivity).add_(part)
        return noised.view(total.shape).to(total.device)


@dataclass(frozen=True)
class Discrete:
    """Whole-number Gaussian noise, for sums of rounded vectors: see `Grid`."""

    grid: Grid
    randomness: Keystream
    mechanism: ClassVar[Mechanism] = "discrete-gaussian"
    source: ClassVar[Source] = "aes-256-ctr"

    def noised(self, total: Tensor, noise_multiplier: float) -> Tensor:
        """Return the noised sum of steps (int64) in the unit of the vectors: float32, on the sum's device.

        Raises
        ------
        ConfigError
            If the noise, by the public grid and multiplier, is outside what can be drawn.
        OverflowError
            If the sum passes 2**62 steps, which no clipped batch does.
        """
        if total.dtype != torch.int64:
            raise TypeError(f"Discrete noise goes on whole numbers, not on {total.dtype}.")
        steps = total.cpu().numpy()
        if noise_multiplier:
            if steps.size and max(abs(int(steps.min())), abs(int(steps.max()))) >= _LARGEST_SUM:
                raise OverflowError("a sum of rounded gradients passes 2**62 steps of its grid")
            noise = sampler(noise_multiplier * self.grid.sensitivity).draw(steps.size, self.randomness)
            steps = steps + noise.reshape(steps.shape)
        return torch.from_numpy(np.asarray(steps * self.grid.step, dtype=np.float32)).to(total.device)


@dataclass(frozen=True)
class OnDevice:
    """Gaussian noise from the accelerator's own generator, in float64, where the sum already is.

    The generator (Philox on CUDA) is no cipher: its 64-bit seed from the operating system is all that is
    secret, and whoever can tell one draw and try 2**64 seeds has the rest. Hence the site's policy must
    allow it. On a CPU it is refused: torch's generator there has a 32-bit seed.
    """

    sensitivity: float
    device: torch.device
    mechanism: ClassVar[Mechanism] = "gaussian"
    source: ClassVar[Source] = "device"
    _generator: torch.Generator = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.device.type != "cuda":
            raise ConfigError(
                f"Noise cannot come from device {self.device.type!r}, whose generator is too weak; only from 'cuda' "
                "(site.toml, [privacy] allow_device_noise)."
            )
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(os.urandom(8), "little"))
        object.__setattr__(self, "_generator", generator)

    def noised(self, total: Tensor, noise_multiplier: float) -> Tensor:
        """Return the noised sum in float32; without noise where the multiplier is 0."""
        if noise_multiplier == 0:
            return total.float()
        noise = torch.randn(total.shape, dtype=torch.float64, device=self.device, generator=self._generator)
        return noise.mul_(noise_multiplier * self.sensitivity).add_(total).float()


Noise = Continuous | Discrete | OnDevice


def choose(
    privacy: Privacy,
    clipping_norm: float,
    parameters: int,
    randomness: Keystream,
    device: torch.device,
    *,
    allow_device_noise: bool = False,
) -> Noise:
    """Return the noise of a training phase: of the run's kind, from the source that the site allows.

    Discrete noise always comes from the keystream. `parameters` is the number of values that the phase
    trains.
    """
    if privacy.noise == "discrete":
        return Discrete(Grid.of(clipping_norm, parameters, privacy.grid), randomness)
    if allow_device_noise and device.type == "cuda":
        return OnDevice(clipping_norm, device)
    return Continuous(clipping_norm, randomness)


@dataclass(frozen=True)
class OfSteps:
    """Real-valued noise on whole numbers of steps of a grid, given in the grid's unit."""

    grid: Grid
    randomness: Keystream

    def noised(self, total: Tensor, noise_multiplier: float) -> Tensor:
        """Return the noised sum of steps (int64) in the unit of the vectors, float32."""
        held = Continuous(self.grid.step * self.grid.sensitivity, self.randomness)
        return held.noised(total.double() * self.grid.step, noise_multiplier)


def of_counts(
    privacy: Privacy, randomness: Keystream, *, sensitivity: float = 1.0, steps: int = 1
) -> OfSteps | Discrete:
    """Return the noise of counts in whole numbers of 1/`steps`, which one unit moves by at most `sensitivity`."""
    grid = Grid(1.0 / steps, sensitivity * steps)
    return Discrete(grid, randomness) if privacy.noise == "discrete" else OfSteps(grid, randomness)
