"""NormalFloat quantisation: k bits a weight, a block of 64 weights sharing one scale.

    w ~ scale * c        c one of the 2^k numbers of a codebook, scale = max |w| over the block

The codebook holds quantiles of the normal distribution, for that is how trained weights are
distributed: where they are dense, its numbers are dense. Importing this module does not import torch.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from .. import numerics
from .arrays import Array, library

BLOCK = 64
AT_ONCE = 4096  # blocks: what is computed on the way stays small beside the weight, and in the cache
CELLS = 1024  # of the lookup table: one and a half of them are shorter than any code's interval


class Quantized(NamedTuple):
    """What `quantize` makes of a weight of this shape: codes, a byte each, and one scale a block.

    A scale is the size of one of the weight's own numbers, so the weight's dtype holds it exactly
    and no wider one would hold more: k + 0.5 bits a weight in float32, k + 0.25 in a half precision
    (were the codes packed, which they are not here).
    """

    codes: UInt8[Array, "blocks 64"]
    scales: Float[Array, "blocks 1"]
    shape: tuple[int, ...]
    bits: int


def codebook(bits: int) -> Float[np.ndarray, " codes"]:
    """The 2^k numbers of NF-k in ascending order: -1, quantiles, 0, one quantile more, 1.

        {ppf(p_i) / ppf(p_0)} for n/2 probabilities p_i, {0}, {-ppf(p_i) / ppf(p_0)} for n/2 - 1 of them

    with n = 2^k, ppf the inverse of the normal distribution function and m probabilities p_0, ..., p_(m-1)
    in equal steps from 0.9677083 down to (and without) 1/2. There is an exact zero, and one more positive
    number than negative ones.

    The numbers are rounded to float32, and on the way there where the published NF4 table was: that makes
    them this table to the last bit, and the same in every dtype.

    Raises:
        ValueError: bits is not 2, 4 or 8.

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
    # each half counted from its own end, as the published table has it: from one end, three of 16 numbers differ
    p = np.where(i < (m + 1) // 2, first - step * i, last + step * (m - i))
    return np.array([NormalDist().inv_cdf(float(x)) for x in p])


def quantize(weight: Float[Array, "..."], bits: int) -> Quantized:
    """The nearest number of the codebook for every w / scale, in blocks of 64 along the rows.

        code = argmin_j |w / scale - c_j|,  scale = max |w| over the block

    The nearest exactly, of w / scale as float32 rounds it (float64 for a float64 weight); in the middle
    between two it is the lower. Zeros fill up the last block, a block of zeros has scale 0.

    Raises:
        ValueError: bits is not 2, 4 or 8; or the weight holds NaN or infinity.

    Source: QLoRA, arXiv 2305.14314, equation 1 and section 3; LoftQ, arXiv 2310.08659, section 3.1.

    >>> q = quantize(np.array([[0.5, -2.0, 0.0], [2.0, 0.3, 0.9]]), bits=2)
    >>> q.codes[0, :6], q.scales
    (array([2, 0, 1, 3, 1, 2], dtype=uint8), array([[2.]]))
    >>> dequantize(q).round(2)
    array([[ 0.68, -2.  ,  0.  ],
           [ 2.  ,  0.  ,  0.68]])
    """
    tables = [_beside(weight, table) for table in _lookup_table(bits, _dtype(weight))]
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
    # in at least float32; divided, not multiplied by 1 / scale, which a subnormal scale would make infinite
    x = blocks / numerics.at_least_float32(xp.where(scales > 0, scales, 1))
    cell = _int32(x * (CELLS // 2) + CELLS // 2)
    codes = first[cell]
    codes += x > middle[cell]
    return codes, scales


def dequantize(quantized: Quantized) -> Float[Array, "..."]:
    """W~ = scale * c, in the shape and dtype of the weight that was quantised.

    |W~ - W| <= scale * (the widest gap of the codebook) / 2, and the largest number of a block stays as it is.
    """
    codes, scales, shape, bits = quantized
    values = _beside(codes, codebook(bits).astype(_dtype(scales)))

    def dequantized(part: slice) -> Array:
        # int32, for torch takes uint8 indices for a mask
        return numerics.cast(values[_int32(codes[part])] * numerics.at_least_float32(scales[part]), scales)

    parts = [dequantized(slice(i, i + AT_ONCE)) for i in range(0, len(codes), AT_ONCE)]
    return library(codes).concatenate(parts).reshape(-1)[: math.prod(shape)].reshape(shape)


def _lookup_table(bits: int, dtype: type) -> tuple[UInt8[np.ndarray, " cells"], Float[np.ndarray, " cells"]]:
    """For each cell of [-1, 1]: the code at its start, and the middle beyond which it is the next one.

    A table of the 2^k distances of every weight takes 2^k copies of it, a search takes k steps; this takes two
    reads. The code is that of half a cell before the start, so that x * CELLS may be rounded across it.
    """
    values = codebook(bits)
    middles = (values[:-1] + values[1:]) / 2  # exact: these are float32 numbers in float64
    starts = (np.arange(CELLS + 1) - 0.5) * (2 / CELLS) - 1
    first = np.searchsorted(middles, starts)
    # the largest number of dtype that is not above the middle: for x in dtype, x > it just where x > the middle
    below = middles.astype(dtype)
    below = np.where(below > middles, np.nextafter(below, dtype(-1)), below)
    return first.astype(np.uint8), np.append(below, dtype(1))[first]


def _dtype(x: Array) -> type:
    """NumPy's name for the precision that x is computed in."""
    return np.float64 if x.dtype.itemsize == 8 else np.float32


def _beside(x: Array, table: np.ndarray) -> Array:
    """The table in the library and on the device of x."""
    return library(x).from_numpy(table).to(x.device) if numerics.is_torch(x) else table


def _int32(x: Array) -> Array:
    return x.int() if numerics.is_torch(x) else x.astype(np.int32)
