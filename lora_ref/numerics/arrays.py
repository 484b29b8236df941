"""Arrays of two libraries: what NumPy and torch spell differently and is no decomposition."""

import math
import sys
from typing import Any

import numpy as np

from ..core.inits import draw_normal
from ..core.update import Array, is_torch


def library(x: Array) -> Any:
    return sys.modules["torch"] if is_torch(x) else np


def cast(x: Array, like: Array) -> Array:
    """x in the dtype and on the device of another array of the same library."""
    return x.to(like) if is_torch(x) else x.astype(like.dtype, copy=False)


def is_finite(x: Array) -> bool:
    """Has x neither NaN nor infinite entries? Makes no array of x's size, as `isfinite(x).all()` does.

    >>> is_finite(np.array([1.0, np.nan]))
    False
    """
    if is_torch(x):
        x = x.float() if x.itemsize == 1 else x  # torch cannot sum 8-bit types
        if math.isfinite(x.sum()):  # one NaN or infinity makes a sum one; a sum may also become one by its size
            return True
    return 0 in x.shape or (math.isfinite(x.min()) and math.isfinite(x.max()))


def cast_finite(x: Array, like: Array) -> Array:
    """`cast`, but ValueError where the result is not finite.

    >>> cast_finite(np.array([1e5]), np.zeros(1, np.float16))
    Traceback (most recent call last):
    ...
    ValueError: the start is not finite in float16: lora_alpha, or the weight or the data, are too large or too small
    """
    with np.errstate(over="ignore"):  # said below
        x = cast(x, like)
    if not is_finite(x):
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(
            f"the start is not finite in {dtype}: lora_alpha, or the weight or the data, are too large or too small"
        )
    return x


def near_one(x: Array) -> tuple[Array, int]:
    """x / 2^e and e, which is 0 unless squares of x may leave its dtype: then the largest of x / 2^e is near 1.

    Raises:
        ValueError: x has NaN or infinite entries.

    >>> near_one(np.array([3e-200, 1e-200]))[0].round(2)
    array([1.15, 0.38])
    """
    check_finite(x)
    e = math.frexp(max(-float(x.min()), float(x.max())))[1] - 1
    far = 30 if x.dtype.itemsize == 4 else 250
    return (x, 0) if abs(e) <= far else (times_power(x, -e), e)


def times_power(x: Array, e: int) -> Array:
    """x * 2^e in two steps, so that neither of them leaves the dtype unless the result does."""
    return x * 2.0 ** (e // 2) * 2.0 ** (e - e // 2)


def check_finite(x: Array) -> None:
    """Raise ValueError if x has NaN or infinite entries, which no decomposition survives.

    >>> check_finite(np.array([1.0, np.nan]))
    Traceback (most recent call last):
    ...
    ValueError: the weight has NaN or infinite entries: it cannot be decomposed
    """
    if not is_finite(x):
        raise ValueError("the weight has NaN or infinite entries: it cannot be decomposed")


def seeded_normal(shape: tuple[int, ...], like: Array, seed: int, rng: Any = None) -> Array:
    """Standard normal draws in the dtype of `like`, from a generator of their own unless one is given."""
    if rng is None:
        rng = sys.modules["torch"].Generator().manual_seed(seed) if is_torch(like) else np.random.default_rng(seed)
    return cast(draw_normal(shape, 1.0, like, rng), like)
