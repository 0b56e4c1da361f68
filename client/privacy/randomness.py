"""Random numbers that nobody outside the site can predict: for who is sampled, and for the noise.

An (epsilon, delta) claim holds against a reader who cannot guess the sample or the noise, so both come from
AES-256 in counter mode under a key from the operating system's entropy: telling its output from true
randomness means breaking AES, which is the only assumption, where the Mersenne Twister or PCG64 give
their whole state away to whoever sees enough output.

Not covered: these normals are floating-point numbers. A sum of finite precision does not hide its low
bits as the real-valued Gaussian of the proofs does (Mironov 2012, "On Significance of the Least Significant
Bits for Differential Privacy"; Holohan and Braghin 2021, "Secure Random Sampling in Differential
Privacy"); `client.privacy.discrete_gaussian` draws whole numbers instead. Nor are the running times of these
methods constant.
"""

import math
import os
from typing import NoReturn, Self

import numpy as np
import numpy.typing as npt
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from shared.errors import ConfigError

_BLOCK = 1 << 15  # numbers made at a time: the temporaries stay in the processor's cache


class Keystream:
    """Draws from one AES-256-CTR stream; no part of the stream is ever used twice.

    Every call goes on where the last one stopped, whatever it drew: the block counter has 128 bits and is
    never set back. One stream belongs to one process and one thread: it refuses to be copied or pickled,
    and refuses every draw in a forked child, which would otherwise repeat its parent's noise (the
    difference of two releases under one noise is free of noise).

    Parameters
    ----------
    key
        32 bytes, for tests only, which need the same numbers again. A private run uses `from_system`: who
        knows the key can take the noise off.

    Raises
    ------
    ConfigError
        If the key does not have 32 bytes.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != 32:
            raise ConfigError(f"A keystream's key has 32 bytes (AES-256), not {len(key)}.")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        self._process = os.getpid()

    @classmethod
    def from_system(cls) -> Self:
        """Open a stream under a fresh key from the operating system's entropy, which is then forgotten."""
        return cls(os.urandom(32))

    def uniform(self, n: int) -> npt.NDArray[np.float64]:
        """Draw `n` independent uniforms from the 2**52 numbers (k + 1/2) / 2**52, 0 <= k < 2**52.

        All are exact in float64, never 0 or 1, and symmetric about 1/2. (The grid cannot be twice as fine:
        above 1/2 its midpoints would need 54 bits, and the last would round to 1.)
        """
        drawn = np.empty(n)
        for start in range(0, n, _BLOCK):
            words = self.words(min(_BLOCK, n - start))
            drawn[start : start + _BLOCK] = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        return drawn

    def normal(self, n: int) -> npt.NDArray[np.float64]:
        """Draw `n` independent standard normals in float64, two at a time (Box and Muller 1958).

        Radius and angle each take a word of 64 bits: the radius sqrt(-2 ln u) of u = (k + 1/2) / 2**63, which
        float64 holds to full relative precision however small, and the angle of 63 bits. Radii therefore reach
        9.419; what is cut off has probability 2**-64 a pair: 6e-10 in all over a thousand releases of 22 million
        coordinates.
        """
        drawn = np.empty(n)
        for start in range(0, n, _BLOCK):
            count = min(_BLOCK, n - start)
            pairs = (count + 1) // 2
            bits = torch.from_numpy((self.words(2 * pairs) >> np.uint64(1)).view(np.int64)).double()
            radius = bits[:pairs].add_(0.5).mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
            angle = bits[pairs:].mul_(2.0**-62 * math.pi)
            drawn[start : start + pairs] = torch.cos(angle).mul_(radius)
            drawn[start + pairs : start + count] = angle.sin_().mul_(radius)[: count - pairs]
        return drawn

    def poisson_sample(self, n: int, rate: float) -> npt.NDArray[np.int64]:
        """Draw each of `n` records on its own with probability `rate`; return who was drawn, in order.

        This is the sampling that the accounting's amplification assumes: the size of the sample is random
        and may be 0. The probability is the rate to within 2**-53; 1 draws everyone. Both the sample and
        its size are private.

        Raises
        ------
        ConfigError
            If the rate is not in (0, 1].
        """
        if not 0 < rate <= 1:
            raise ConfigError(f"sampling_rate={rate} must be above 0 and at most 1.")
        return np.flatnonzero(self.uniform(n) < rate).astype(np.int64)

    def words(self, n: int) -> npt.NDArray[np.uint64]:
        """Draw `n` words of 64 independent fair bits."""
        if os.getpid() != self._process:
            raise RuntimeError("This keystream belongs to the parent process: a fork must open its own.")
        return np.frombuffer(self._encryptor.update(bytes(8 * n)), dtype="<u8")

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError("A keystream cannot be copied or pickled: its copy would repeat its noise.")
