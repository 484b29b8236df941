"""How a requirement says that something does not hold, and how near two numbers must be.

Tolerances are derived, not tuned: |got - want| <= 8 u * bound, where u is the unit roundoff of the dtype and `bound`
the same formula on absolute values, so that cancellation is allowed for and nothing else. Where all numbers are
small integers and powers of two every dtype is exact, and `equal` is asked for.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .rounding import UNIT

Array = np.ndarray


class Broken(AssertionError):
    """A requirement does not hold."""


class Check:
    """What a requirement's body calls; it remembers the largest error, in units of u * bound."""

    def __init__(self) -> None:
        self.max_error_u = 0.0
        self.examples = 0

    def that(self, holds: Any, otherwise: str) -> None:
        """Something must hold."""
        if not holds:
            raise Broken(otherwise)

    def equal(self, got: Any, want: Any, what: str) -> None:
        """Exactly equal: shape and every number; of lists of names and of sets, every member."""
        if isinstance(want, set | frozenset) and isinstance(got, Iterable):
            return self.same_set(got, want, what)
        if _names(got) and _names(want) and sorted(set(want)) == list(want) and sorted(set(got)) == list(got):
            return self.same_set(got, want, what)
        self.that(got is not None, f"{what}: there is none")
        if isinstance(got, Mapping) or isinstance(want, Mapping):
            self.that(got == want, f"{what}: {got!r}, must be {want!r}")
            return
        got, want = np.asarray(got), np.asarray(want)
        self.that(got.shape == want.shape, f"{what}: has the shape {got.shape}, must have {want.shape}")
        if not np.array_equal(got, want):
            at = _worst(got, want)
            raise Broken(f"{what}: {got[at]!r} at {list(at)}, must be exactly {want[at]!r}")

    def present(self, got: Array | None, what: str) -> Array:
        """What is there: it must not be None."""
        if got is None:
            raise Broken(f"{what}: there is none")
        return got

    def same_set(self, got: Iterable[Any], want: Iterable[Any], what: str) -> None:
        """The same things, in any order; the message names those that are missing and those that are too many."""
        got, want = set(got), set(want)
        if got != want:
            said = {"missing": want - got, "too many": got - want}
            parts = [f"{word}: {', '.join(sorted(map(str, names)))}" for word, names in said.items() if names]
            raise Broken(f"{what}: {'; '.join(parts)}")

    def close(self, got: Any, want: Any, bound: Any, dtype: str, what: str, factor: float = 8.0) -> None:
        """Equal up to `factor` roundings of numbers as large as `bound` (an array, or one number for all)."""
        self.that(got is not None, f"{what}: there is none")
        got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
        self.that(got.shape == want.shape, f"{what}: has the shape {got.shape}, must have {want.shape}")
        self.that(np.isfinite(got).all() or not np.isfinite(want).all(), f"{what}: has NaN or infinite numbers")
        if not got.size:
            return
        # below the smallest normal number, roundings do not get smaller any more
        smallest = 2.0**-14 if dtype == "float16" else 2.0**-120
        unit = UNIT[dtype] * np.maximum(np.broadcast_to(bound, got.shape), smallest)
        error = abs(got - want) / unit
        self.max_error_u = max(self.max_error_u, float(error.max()))
        if (error > factor).any():
            at = np.unravel_index(error.argmax(), error.shape)
            raise Broken(
                f"{what}: {got[at]:.9g} at {[int(i) for i in at]}, must be {want[at]:.9g} "
                f"(off by {error[at]:.3g} roundings of {dtype}, {factor:g} are allowed)"
            )

    def tried(self, action: Callable[[], Any]) -> Any:
        """What the action returns; None if it is refused with an error. A method that is not written is no refusal."""
        try:
            return action()
        except Exception as error:
            if isinstance(error, NotImplementedError) and _raised_in(error) == "contract.py":
                raise
            return None

    def accepted(self, action: Callable[[], object]) -> bool:
        """Whether the action is done; False if it is refused with an error, as in `tried`."""

        def done() -> bool:
            action()
            return True

        return self.tried(done) is not None

    def refused(self, action: Callable[[], object], what: str) -> Exception:
        """An error must be raised: any kind, but the NotImplementedError of a method that the adapter class lacks."""
        try:
            action()
        except Exception as error:
            if isinstance(error, NotImplementedError) and _raised_in(error) == "contract.py":
                raise
            return error
        raise Broken(f"{what}: must be refused with an error, but was accepted")


def _raised_in(error: Exception) -> str:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).name


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _worst(got: np.ndarray, want: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(got != want)[0])  # NaN differs from NaN: it is never right
