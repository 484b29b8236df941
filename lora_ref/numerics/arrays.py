"""Array functions with one name for NumPy and torch. The decompositions are in `dense` and `leading`."""

import math
import sys
from typing import Any

import numpy as np

from ..core.inits import draw_normal
from ..core.update import Array, is_torch


def library(x: Array) -> Any:
    """The module `torch` for a tensor, `numpy` for an array.

    >>> library(np.zeros(2)) is np
    True
    """
    return sys.modules["torch"] if is_torch(x) else np


def detached(x: Array) -> Array:
    """x itself, without its gradient."""
    return x.detach() if is_torch(x) else x


def cast(x: Array, like: Array) -> Array:
    """x in the dtype and on the device of another array of the same library.

    >>> cast(np.array([1.5]), np.zeros(1, np.float32)).dtype
    dtype('float32')
    """
    return x.to(like) if is_torch(x) else x.astype(like.dtype, copy=False)


def beside(x: Array, table: np.ndarray) -> Array:
    """The NumPy array in the library and on the device of x; no copy for CPU tensors."""
    return library(x).from_numpy(table).to(x.device) if is_torch(x) else table


def is_finite(x: Array) -> bool:
    """True if x has neither NaN nor infinite entries.

    >>> is_finite(np.array([1.0, np.nan]))
    False
    """
    x = detached(x)
    if is_torch(x):
        x = x.float() if x.itemsize == 1 else x  # torch has no sum of 8-bit floats
        # with a NaN or infinity no sum is finite; a sum may overflow as well, so the second test, a slow one, decides
        if math.isfinite(x.sum()):
            return True
    return bool(library(x).isfinite(x).all())


def check_finite(x: Array) -> None:
    """Raise ValueError if x has NaN or infinite entries. No decomposition accepts them.

    >>> check_finite(np.array([1.0, np.nan]))
    Traceback (most recent call last):
    ...
    ValueError: the weight has NaN or infinite entries: it cannot be decomposed
    """
    if not is_finite(x):
        raise ValueError("the weight has NaN or infinite entries: it cannot be decomposed")


def cast_finite(x: Array, like: Array) -> Array:
    """`cast`, but ValueError where the result is not finite.

    >>> cast_finite(np.array([1e5]), np.zeros(1, np.float16))
    Traceback (most recent call last):
    ...
    ValueError: the start is not finite in float16: lora_alpha, or the weight or the data, are too large or too small
    """
    with np.errstate(over="ignore"):  # the error below reports the overflow
        x = cast(x, like)
    if not is_finite(x):
        dtype = str(x.dtype).removeprefix("torch.")
        size = "lora_alpha, or the weight or the data, are too large or too small"
        raise ValueError(f"the start is not finite in {dtype}: {size}")
    return x


def scaled_to_one(x: Array) -> tuple[Array, int]:
    """(x / 2^e, e) such that squares of the result stay in range: e = 0 if they do, else the largest entry is near 1.

    Raises: ValueError: x has NaN or infinite entries.

    >>> scaled_to_one(np.array([3e-200, 1e-200]))[0].round(2)
    array([1.15, 0.38])
    """
    check_finite(x)
    ends = detached(x).min(), detached(x).max()
    e = math.frexp(max(-float(ends[0]), float(ends[1])))[1] - 1
    far = 30 if x.dtype.itemsize == 4 else 250
    return (x, 0) if abs(e) <= far else (times_2_to_the(x, -e), e)


def times_2_to_the(x: Array, e: int) -> Array:
    """x * 2^e in two steps. So neither step overflows or underflows unless the result does.

    >>> times_2_to_the(np.array([2.0**-1000]), 2000)[0] == 2.0**1000
    np.True_
    """
    return x * 2.0 ** (e // 2) * 2.0 ** (e - e // 2)


def seeded_normal(shape: tuple[int, ...], like: Array, seed: int, rng: Any = None) -> Array:
    """Draws of N(0, 1) in the dtype of `like`, from `rng`, or from a new generator with this seed."""
    if rng is None:
        rng = sys.modules["torch"].Generator().manual_seed(seed) if is_torch(like) else np.random.default_rng(seed)
    return cast(draw_normal(shape, 1.0, like, rng), like)
