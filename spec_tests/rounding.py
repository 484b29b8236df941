"""How near two computed numbers must be, on any machine: every bound is derived from what is summed.

A sum of n products in floating point is off by at most about n u (|a_1 b_1| + ... + |a_n b_n|), whatever the order of
the sum, with u the unit roundoff of the dtype. (Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms,
2nd edition, equation 3.5.) Another processor sums in another order. So a test may ask for no more than this bound,
and a fixed `rtol` and `atol` is either too wide to see a fault or too narrow for the next machine.

Three functions compare, for NumPy arrays, torch tensors, numbers, and dicts and sequences of them:

- `close(got, want, terms, size)`: the bound of the sum above. It works in every dtype.
- `agree(got, want)`: float64 only, for a whole network, whose sums nobody writes down. It gives away 20 of the 53 bits.
- `distance(a, b)`: how far two results are apart, where a test expects them to differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
#: The smallest normal number: below it the spacing of numbers does not shrink any more.
SMALLEST = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}
#: `agree` allows this many roundings of the largest number: 2^20 u = 1.2e-10 of it.
ROUNDINGS = 2.0**20


def unit(dtype: Any) -> float:
    """The unit roundoff u of a floating dtype: half of the distance from 1 to the next number.

    Args:
        dtype: a torch or NumPy dtype, its name, or an array.

    Raises:
        TypeError: for a dtype that is none of float64, float32, float16 and bfloat16.

    >>> unit("float16"), unit(np.zeros(3, dtype=np.float32))
    (0.00048828125, 5.960464477539063e-08)
    """
    return UNIT[_name(dtype)]


def close(got: Any, want: Any, terms: float, size: Any, dtype: Any = None, what: str = "") -> None:
    """|got - want| <= 2 * terms * u * size: two results of the same sum, each with its roundings.

    Args:
        got: what was computed, of any shape.
        want: what it is compared with, of the same shape. It may have a wider dtype than `got`.
        terms: how many roundings an entry has been through: the length of its longest sum, one for each operation more.
        size: the same formula on absolute values, |A| @ |B| for A @ B: one number, or an array that broadcasts.
        dtype: the dtype whose u counts: by default that of `got`.
        what: the name that the error message begins with.

    Raises:
        AssertionError: names the worst entry, its error in roundings of `size`, and how many are allowed.
            A NaN is never near anything.
        ValueError: `size` or `terms` is infinite or NaN, so that everything would be near enough.

    >>> x = np.float32([1.0, 1e4, -1e4])
    >>> close(x.sum(), x[::-1].sum(), terms=3, size=abs(x).sum())
    >>> close(x.sum(), np.float32(1.25), terms=3, size=abs(x).sum(), what="sum")
    Traceback (most recent call last):
    AssertionError: sum: 1 at [], wanted 1.25: off by 210 roundings of float32 numbers as large as 2e+04, 6 are allowed
    """
    name = _name(got if dtype is None else dtype)
    a, b, bound = _float64(got), _float64(want), abs(_float64(size))
    label = f"{what}: " if what else ""
    assert a.shape == b.shape, f"{label}has the shape {a.shape}, wanted {b.shape}"
    if not (np.isfinite(bound).all() and np.isfinite(terms)):
        raise ValueError(f"{label}size and terms must be finite, or every result is near enough: terms={terms}")
    same = a == b  # infinite numbers of one sign, too
    largest = np.broadcast_to(np.maximum(bound, SMALLEST[name]), a.shape)
    # float64 has no half of the distance between its smallest numbers: there one such distance is the unit
    rounding = np.maximum(UNIT[name] * largest, 2.0**-1074)
    error = np.where(same, 0.0, abs(np.where(same, 0.0, a) - np.where(same, 0.0, b)) / rounding)
    if not (error <= 2 * terms).all():  # a NaN is never within a bound
        at = np.unravel_index(np.where(np.isnan(error), np.inf, error).argmax(), error.shape)
        raise AssertionError(
            f"{label}{a[at]:.9g} at {[int(i) for i in at]}, wanted {b[at]:.9g}: off by {error[at]:.3g} roundings of "
            f"{name} numbers as large as {largest[at]:.3g}, {2 * terms:g} are allowed"
        )


def agree(got: Any, want: Any, size: float = 0.0, what: str = "") -> None:
    """|got - want| <= 2^20 u * the largest number of both, in float64.

    A network with a known fault is off by far more than 1e-10, one without by far less, in whatever order it sums.
    The largest number is that of the whole call: pass a dict of gradients as one, for some of them may cancel to zero.

    Args:
        got: numbers, arrays or tensors in float64, or a dict or sequence of them.
        want: the same structure.
        size: how large the numbers were before they cancelled, if nothing in `got` and `want` is as large.
        what: the name that the error message begins with.

    Raises:
        AssertionError: the structures or the numbers differ, or there are no numbers at all.
        TypeError: something is float32 or narrower: use `close`, with what is summed.

    >>> agree({"a": [0.1 + 0.2], "b": np.zeros(2)}, {"a": [0.3], "b": np.full(2, 1e-17)})
    >>> agree(np.float32(1), 1.0)
    Traceback (most recent call last):
    TypeError: agree compares float64 alone, and this is float32: use close(got, want, terms, size)
    """
    pairs = list(_pairs(got, want, what))
    assert pairs, f"{what or 'agree'}: nothing is compared"
    for _, *pair in pairs:
        for x in pair:
            if _name(x) != "float64":
                raise TypeError(
                    f"agree compares float64 alone, and this is {_name(x)}: use close(got, want, terms, size)"
                )
    numbers = [abs(x[np.isfinite(x)]) for _, *pair in pairs for x in map(_float64, pair)]
    largest = max([size, *(float(x.max(initial=0)) for x in numbers)])
    for name, a, b in pairs:
        close(a, b, ROUNDINGS / 2, largest, what=name)


def distance(a: Any, b: Any) -> float:
    """The largest |a - b| as a share of the largest number of both; 0 for two arrays of zeros. Without a unit.

    NaN, if there is one in `a` or `b`: no comparison with it holds.

    Raises:
        AssertionError: the structures or the shapes differ.

    >>> distance([1.0, 2.0], [1.0, 2.5])
    0.2
    """
    pairs = [(_float64(x), _float64(y)) for _, x, y in _pairs(a, b, "")]
    for x, y in pairs:
        assert x.shape == y.shape, f"has the shape {x.shape}, wanted {y.shape}"
    largest = np.max([abs(x).max(initial=0) for pair in pairs for x in pair], initial=0)
    return float(np.max([abs(x - y).max(initial=0) for x, y in pairs], initial=0) / (largest or 1.0))


def _pairs(got: Any, want: Any, what: str) -> Iterator[tuple[str, Any, Any]]:
    """The leaves of two equal structures, with a name for each."""
    assert isinstance(got, Mapping) == isinstance(want, Mapping), f"{what or 'the structure'}: one of both is a dict"
    if isinstance(want, Mapping):
        assert got.keys() == want.keys(), f"{what or 'the keys'}: has {sorted(got)}, wanted {sorted(want)}"
        for key in want:
            yield from _pairs(got[key], want[key], f"{what}[{key!r}]")
    elif isinstance(want, list | tuple):
        assert len(got) == len(want), f"{what or 'the sequence'}: has {len(got)} items, wanted {len(want)}"
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            yield from _pairs(a, b, f"{what}[{i}]")
    else:
        yield what, got, want


def _name(x: Any) -> str:
    """`torch.float32`, `np.dtype("float32")`, "float32" and an array of it: "float32". Python's numbers are float64."""
    if isinstance(x, list | tuple):
        return max((_name(each) for each in x), key=UNIT.__getitem__, default="float64")
    if isinstance(x, int | float) and not isinstance(x, np.generic):
        return "float64"
    name = str(getattr(x, "dtype", x)).removeprefix("torch.")
    if name not in UNIT:
        raise TypeError(f"{name!r} is no dtype that can be compared; allowed: {', '.join(UNIT)}")
    return name


def _float64(x: Any) -> np.ndarray:
    """Any array, exactly, on the CPU."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().double()
    return np.asarray(x, dtype=np.float64)
