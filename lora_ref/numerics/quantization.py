"""NormalFloat quantisation: k bits for each weight, and one scale for each block of 64 weights.

    w ~ scale * c        c one of the 2^k numbers of a codebook, scale = max |w| over the block

The codebook holds quantiles of the normal distribution, because trained weights are distributed so.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from .. import numerics
from .arrays import Array, beside, library

BLOCK = 64
AT_ONCE = 4096  # blocks that are computed at a time: intermediate results are small and stay in the cache
CELLS = 1024  # of the lookup table: one and a half of them are shorter than any code's interval


class Quantized(NamedTuple):
    """The result of `quantize` for a weight of this shape: a code of one byte for each weight, a scale for each block.

    A scale is the magnitude of one of the weights, so the weight's dtype holds it exactly. The codes are not packed.
    """

    codes: UInt8[Array, "blocks 64"]
    scales: Float[Array, "blocks 1"]
    shape: tuple[int, ...]
    bits: int


def codebook(bits: int) -> Float[np.ndarray, " codes"]:
    """The n = 2^k numbers of NF-k (n,), in ascending order from -1 to 1.

        {ppf(p_i) / ppf(p_0)} for n/2 probabilities p_i, {0}, {-ppf(p_i) / ppf(p_0)} for n/2 - 1 of them

    ppf is the inverse of the normal distribution function. m probabilities p_0, ..., p_(m-1) go down in equal steps
    from 0.9677083 to 1/2, which is excluded. Zero is exact. There is one more positive number than negative ones.

    Numbers and intermediate results are rounded as those of the published NF4 table, so they are it to the last bit.
    Raises: ValueError: bits is not 2, 4 or 8.
    Source: QLoRA, arXiv 2305.14314, section 3 and appendix E (NF4); LoftQ, arXiv 2310.08659 (NF2).

    >>> codebook(2)
    array([-1.        ,  0.        ,  0.33791524,  1.        ])
    >>> codebook(4)[:8].round(4)
    array([-1.    , -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911,  0.    ])
    """
    if bits not in (2, 4, 8):
        raise ValueError(f"bits={bits!r}: must be 2, 4 or 8")
    half = 2 ** (bits - 1)
    values = np.sort(np.concatenate([_upper_quantiles(half), [0], -_upper_quantiles(half - 1)]).astype(np.float32))
    return (values / values.max()).astype(np.float64)


def _upper_quantiles(m: int) -> Float[np.ndarray, " m"]:
    first, last = np.float32(0.9677083), np.float32(0.5)
    i, step = np.arange(m, dtype=np.float32), (first - last) / np.float32(m)
    # each half is counted from its own end, as in the published table; otherwise three of its 16 numbers differ
    p = np.where(i < (m + 1) // 2, first - step * i, last + step * (m - i))
    from scipy.special import ndtri  # here: its import takes as long as that of lora_ref

    return ndtri(p.astype(np.float64))


def quantize(weight: Float[Array, "..."], bits: int) -> Quantized:
    """The nearest number of the codebook for every w / scale, in blocks of 64 along the rows.

        code = argmin_j |w / scale - c_j|,  scale = max |w| over the block

    w / scale is rounded to float32 (float64 for a float64 weight). Its nearest number is found exactly; in the middle
    between two it is the lower one. The last block is filled with zeros. A block of zeros has scale 0.
    Raises: ValueError: bits is not 2, 4 or 8; or the weight holds NaN or infinity.
    Source: QLoRA, arXiv 2305.14314, equation 1 and section 3; LoftQ, arXiv 2310.08659, section 3.1.

    >>> q = quantize(np.array([[0.5, -2.0, 0.0], [2.0, 0.3, 0.9]]), bits=2)
    >>> q.codes[0, :6], q.scales
    (array([2, 0, 1, 3, 1, 2], dtype=uint8), array([[2.]]))
    >>> dequantize(q).round(2)
    array([[ 0.68, -2.  ,  0.  ],
           [ 2.  ,  0.  ,  0.68]])
    """
    tables = [beside(weight, table) for table in _lookup_table(bits, _dtype(weight))]
    pad = library(weight).nn.functional.pad if numerics.is_torch(weight) else np.pad
    flat = weight.reshape(-1)
    blocks = (pad(flat, (0, -len(flat) % BLOCK)) if len(flat) % BLOCK else flat).reshape(-1, BLOCK)
    parts = [_quantize(blocks[i : i + AT_ONCE], *tables) for i in range(0, len(blocks), AT_ONCE)]
    codes, scales = (library(weight).concatenate(part) for part in zip(*parts, strict=True))
    return Quantized(codes, scales, tuple(weight.shape), bits)


def _quantize(blocks: Array, first: Array, middle: Array) -> tuple[Array, Array]:
    xp = library(blocks)
    scales = xp.amax(abs(blocks), axis=1, keepdims=True)
    if not xp.isfinite(scales).all():
        raise ValueError("the weight holds NaN or infinity: it has no scale to be quantised with")
    # in at least float32; a division, because 1 / scale is infinite for a subnormal scale
    x = blocks / numerics.at_least_float32(xp.where(scales > 0, scales, 1))
    cell = _int32(x * (CELLS // 2) + CELLS // 2)
    codes = first[cell]
    codes += x > middle[cell]
    return codes, scales


def dequantize(quantized: Quantized) -> Float[Array, "..."]:
    """W~ = scale * c, in the shape and dtype of the weight that was quantised.

    |W~ - W| <= scale * (the widest gap of the codebook) / 2. The largest number of each block does not change.

    >>> dequantize(quantize(np.array([[0.0, -2.0]]), bits=4))
    array([[ 0., -2.]])
    """
    codes, scales, shape, bits = quantized
    values = beside(codes, codebook(bits).astype(_dtype(scales)))

    def dequantized(part: slice) -> Array:
        # int32, because torch reads uint8 indices as a mask
        return numerics.cast(values[_int32(codes[part])] * numerics.at_least_float32(scales[part]), scales)

    parts = [dequantized(slice(i, i + AT_ONCE)) for i in range(0, len(codes), AT_ONCE)]
    return library(codes).concatenate(parts).reshape(-1)[: math.prod(shape)].reshape(shape)


def _lookup_table(bits: int, dtype: type) -> tuple[UInt8[np.ndarray, " cells"], Float[np.ndarray, " cells"]]:
    """For each cell of [-1, 1]: the code at its start, and the middle above which the code is one more.

    Each weight costs two reads. A table of its distances would need 2^k times its memory, and a search k steps. The
    code is that of half a cell before the start, so that x * CELLS may be rounded across it.
    """
    values = codebook(bits)
    middles = (values[:-1] + values[1:]) / 2  # exact: these are float32 numbers in float64
    starts = (np.arange(CELLS + 1) - 0.5) * (2 / CELLS) - 1
    first = np.searchsorted(middles, starts)
    # the largest number of dtype that is not above the middle: a number of dtype is above both or neither
    below = middles.astype(dtype)
    below = np.where(below > middles, np.nextafter(below, dtype(-1)), below)
    return first.astype(np.uint8), np.append(below, dtype(1))[first]


def _dtype(x: Array) -> type:
    """The NumPy dtype in which x is quantised."""
    return np.float64 if x.dtype.itemsize == 8 else np.float32


def _int32(x: Array) -> Array:
    return x.int() if numerics.is_torch(x) else x.astype(np.int32)
