"""A site's update, packed smaller for its way to the coordinator, and unpacked there just before it is folded in.

Everything here happens after the noise: what is packed is the output of a privacy mechanism that the ledger charges, so
whatever is computed from it alone (a scale, which values are largest, what is left over for later) is post-processing and
costs no privacy (Dwork and Roth 2014, proposition 2.1). Both sides know names and shapes, and `compression` of the run says
how; so a packed update is exactly as long as these say, and holds no names, shapes or lengths that could be untrue:

    float16    mark, scale (float32), n values (float16) of that many scales
    int8       mark, ceil(n / block) scales (float32), n whole numbers (int8) of that many of their block's scale
    top-k      mark, k values (float32), and their places: a bit for each of n, or k numbers (uint32), whichever is shorter

n values are all arrays end to end, in the order of their names; the mark is four letters; bytes are little-endian.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from shared.arrays import Arrays, Packed, Update
from shared.messages import MessageError
from shared.run_config import Compression

Values = npt.NDArray[np.float32]  # (n,): the arrays end to end
Words = Callable[[int], npt.NDArray[np.uint64]]  # as many words of 64 fair, independent bits that nobody can foresee

MARKS = {"float16": b"f16 ", "int8": b"int8", "top-k": b"topk"}
MARK = 4  # bytes
LEVELS = 127  # of int8, on either side of 0
TOP = 15  # float16: the largest value comes to between 2^14 and 2^15 scales, below the largest float16 of 65,504
CHUNK = 2**14  # values at a time: the temporaries stay in the processor's cache
MOST_PLACES = 2**32  # that a number of 32 bits can tell apart


def compress(update: Arrays, residual: Arrays, settings: Compression, words: Words) -> tuple[Update, Arrays]:
    """Return what is sent of a noised update, and what is left of it at the site.

    Of `float16` and `int8` nothing is left, nor of `none`, which sends the update as it is. Of `top-k` exactly what is not
    sent is left: in float32, sent + left = update + residual, value by value, for one of the two is 0.

    An update that is not finite comes out as one that is not finite, which the coordinator refuses.

    Parameters
    ----------
    residual
        What the phase's updates before have left; empty for none. Of `top-k` alone.
    words
        For the rounding of `int8`: with other words, the same update is rounded otherwise.
    """
    if settings.update == "none":
        return update, {}
    with np.errstate(over="ignore", invalid="ignore"):
        values = _flat(update)
        if settings.update == "top-k":
            body, values = _top_k(values + _flat(residual) if residual else values, settings)
        elif settings.update == "int8":
            body = _int8(values, settings.block, words)
        else:
            body = _float16(values)
    parts = [np.frombuffer(MARKS[settings.update], np.uint8), *(part.view(np.uint8) for part in body)]
    return np.concatenate(parts), _shaped(values, update) if settings.update == "top-k" else {}


def decompress(update: Update, like: Arrays, settings: Compression) -> Arrays:
    """Return the arrays that were sent, shaped as `like`.

    What is allocated follows from `like`, never from what arrived. Updates that travel as they are, are not looked at.

    Raises
    ------
    MessageError
        Where the update is not packed as `settings` say, or holds what no packing makes.
    """
    if settings.update == "none":
        if not isinstance(update, dict):
            raise MessageError("the update is packed, and the run's compression.update is 'none'.")
        return update
    if isinstance(update, dict) or update[:MARK].tobytes() != MARKS[settings.update]:
        raise MessageError(f"the update is not packed as the run's compression.update={settings.update!r} asks.")
    if update.size != (expected := size(like, settings)):
        raise MessageError(f"the packed update has {update.size} bytes, and {expected} are expected.")
    n, body = _count(like), update[MARK:]
    with np.errstate(over="ignore", invalid="ignore"):
        if settings.update == "top-k":
            values = _from_top_k(body, n, settings)
        elif settings.update == "int8":
            values = _from_int8(body, n, settings.block)
        else:
            values = body[4:].view("<f2").astype(np.float32) * body[:4].view("<f4")
    return _shaped(values, like)


def size(like: Arrays, settings: Compression) -> int:
    """Bytes of an update of arrays like these, packed; of `none` those of its values."""
    n = _count(like)
    if settings.update == "none":
        return 4 * n
    if settings.update == "float16":
        return MARK + 4 + 2 * n
    if settings.update == "int8":
        return MARK + 4 * -(-n // settings.block) + n
    k = _kept(n, settings)
    return MARK + 4 * k + (_bits(n) if _by_bits(n, k) else 4 * k)


def _count(arrays: Arrays) -> int:
    return sum(array.size for array in arrays.values())


def _flat(arrays: Arrays) -> Values:
    ordered = [np.ravel(arrays[name]) for name in sorted(arrays)]
    return np.concatenate([np.zeros(0, np.float32), *ordered]).astype("<f4", copy=False)


def _shaped(values: Values, like: Arrays) -> Arrays:
    """Take values apart again, in the order of `like`'s own names."""
    names, found, start = sorted(like), {}, 0
    for name in names:
        found[name] = values[start : start + like[name].size].reshape(like[name].shape)
        start += like[name].size
    return {name: found[name] for name in like}


# -- float16 ------------------------------------------------------------------------------------------------------------


def _float16(values: Values) -> list[npt.NDArray[np.generic]]:
    """Round to the nearest float16 of a power of two, which is exact to divide by.

    The largest value comes to at least 2^14 scales, so values down to 2^-28 of it keep eleven bits; smaller ones lose theirs
    one by one, and below 2^-39 of it they may come to 0.
    """
    largest = float(np.abs(values).max(initial=0.0))
    if not math.isfinite(largest):
        return [np.array([np.nan], "<f4"), np.zeros(values.size, "<f2")]
    power = max(math.frexp(largest)[1] - TOP, -126)  # of the smallest normal float32, at least
    scale = np.array([math.ldexp(1.0, power)], "<f4")
    return [scale, (values / scale).astype("<f2")]


# -- int8 ---------------------------------------------------------------------------------------------------------------


def _int8(values: Values, block: int, words: Words) -> list[npt.NDArray[np.generic]]:
    """Round each value to one of the two whole numbers of its block's scale beside it, so that the mean is the value.

    The upper one has the value's share of the way there as its probability, to within 2^-33 (Alistarh et al. 2017, "QSGD",
    section 3.1). The scale is the block's largest value over 127, rounded up, so that nothing is cut off.
    """
    blocks = -(-values.size // block)
    scales, codes = np.empty(blocks, "<f4"), np.empty(values.size, np.int8)
    rows = max(1, CHUNK // block)
    for first in range(0, blocks, rows):
        part = values[first * block : (first + rows) * block]
        padded = np.zeros((-(-part.size // block), block))
        padded.reshape(-1)[: part.size] = np.abs(part)
        largest = padded.max(1)
        scale = _scale(largest)
        scales[first : first + rows] = scale
        divisor = np.where(scale > 0, scale, 1.0)[:, None]  # of a block that is not finite, too
        steps = (np.where(np.isfinite(largest)[:, None], padded, 0.0) / divisor).reshape(-1)[: part.size]
        below = np.floor(steps)
        drawn = words((part.size + 1) // 2).view("<u4")[: part.size]
        below += (drawn + 0.5) * 2.0**-32 < steps - below
        codes[first * block : first * block + part.size] = np.copysign(below, part)
    return [scales, codes]


def _scale(largest: npt.NDArray[np.float64]) -> Values:
    """Return the smallest float32 of which 127 reach the largest value; NaN for what is not finite."""
    scale = (largest / LEVELS).astype(np.float32)
    short = scale.astype(np.float64) * LEVELS < largest
    scale[short] = np.nextafter(scale[short], np.float32(np.inf))
    scale[~np.isfinite(largest)] = np.nan
    return scale


def _from_int8(body: Packed, n: int, block: int) -> Values:
    scales = body[: 4 * -(-n // block)].view("<f4")
    values = body[4 * scales.size :].view(np.int8).astype(np.float32)
    whole = n // block * block
    values[:whole].reshape(-1, block)[...] *= scales[: n // block, None]
    values[whole:] *= scales[n // block :].repeat(n - whole)  # of the one that is left, or of none
    return values


# -- top-k --------------------------------------------------------------------------------------------------------------


def _top_k(values: Values, settings: Compression) -> tuple[list[npt.NDArray[np.generic]], Values]:
    """Choose the `keep` largest values, of two that are equal the first; return them packed, and the others.

    What is not finite counts as largest, and none of it is left.
    """
    k = _kept(values.size, settings)
    taken = np.zeros(values.size, bool)
    if k:
        sizes = np.abs(values)
        sizes[np.isnan(sizes)] = np.inf
        least = np.partition(sizes, values.size - k)[values.size - k]
        np.greater(sizes, least, out=taken)
        taken[np.flatnonzero(sizes == least)[: k - np.count_nonzero(taken)]] = True
    if _by_bits(values.size, k):
        places: npt.NDArray[np.generic] = np.packbits(taken, bitorder="little")
    else:
        places = np.flatnonzero(taken).astype("<u4")
    left = np.where(taken | ~np.isfinite(values), np.float32(0), values)
    return [values[taken], places], left


def _from_top_k(body: Packed, n: int, settings: Compression) -> Values:
    k = _kept(n, settings)
    sent, places = body[: 4 * k].view("<f4"), body[4 * k :]
    values = np.zeros(n, np.float32)
    if _by_bits(n, k):
        taken = np.unpackbits(places, count=n, bitorder="little").view(bool)
        if np.count_nonzero(taken) != k:
            raise MessageError(f"the packed update marks {np.count_nonzero(taken)} places, and {k} are expected.")
        values[taken] = sent
        return values
    at = places.view("<u4")
    if k and (int(at[-1]) >= n or not (at[1:] > at[:-1]).all()):
        raise MessageError(f"the packed update's places are not {k} of {n}, each once and in order.")
    values[at] = sent
    return values


def _kept(n: int, settings: Compression) -> int:
    return math.ceil(Fraction(str(settings.keep)) * n)  # 0.7 of 10 is 7, not 8


def _bits(n: int) -> int:
    return -(-n // 8)


def _by_bits(n: int, k: int) -> bool:
    return _bits(n) <= 4 * k or n > MOST_PLACES
