"""What the initialisations share that take their first update out of the base weight.

    W = residual + s * B @ A      the adapted weight at the start is W, the frozen part of it smaller

They divide by s, so they need s > 0, and there are no more than min(in, out) directions to take.
"""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.scaling import check_scaling
from ..core.update import Array, Factors
from ..numerics.arrays import library


def check(method: str, shape: tuple[int, ...], r: int, scaling: float = 1.0) -> None:
    """Raise ValueError unless this method can take r directions out of a weight of this shape at this scaling.

    >>> check("pissa", (4, 8), r=6)
    Traceback (most recent call last):
    ...
    ValueError: init_lora_weights='pissa' needs r <= min(in, out) = 4, r=6 is more
    """
    if r > min(shape):
        raise ValueError(f"init_lora_weights={method!r} needs r <= min(in, out) = {min(shape)}, r={r} is more")
    if not scaling > 0:
        raise ValueError(f"init_lora_weights={method!r} divides by the scaling: lora_alpha must be > 0")


def take_out(
    weight: Float[Array, "out in"], A: Float[Array, "r in"], B: Float[Array, "out r"], scaling: float
) -> Factors:
    """A, B and W - s * B @ A, with A and B rounded to the weight's dtype first; ValueError where one overflows.

    Rounding afterwards would leave s * (B @ A - stored B @ stored A) out of the adapted weight:
    in a half precision far more than the rounding of the residual itself.

    >>> import numpy as np
    >>> take_out(np.eye(2), np.array([[2.0, 0.0]]), np.array([[1.0], [0.0]]), scaling=0.5).residual
    array([[0., 0.],
           [0., 1.]])
    """
    A, B = cast_factors(weight, A, B, scaling)
    residual: Any = numerics.subtract_product(weight, B, A, scaling)
    return Factors(A, B, numerics.cast_finite(residual, weight))


def cast_factors(
    weight: Float[Array, "out in"], A: Float[Array, "r in"], B: Float[Array, "out r"], scaling: float
) -> tuple[Float[Array, "r in"], Float[Array, "out r"]]:
    """A and B in the weight's dtype; ValueError if they, their product or the scaling are too large for it."""
    largest = library(weight).finfo(numerics.at_least_float32(weight[:0]).dtype).max
    check_scaling(scaling, largest)
    A, B = numerics.cast_finite(A, weight), numerics.cast_finite(B, weight)
    if len(A) * float(abs(A).max()) * float(abs(B).max()) > largest:
        raise ValueError(f"B @ A is not finite at the start: with a scaling of {scaling:g} the factors are too large")
    return A, B
