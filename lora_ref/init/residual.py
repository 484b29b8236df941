"""The shared part of PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ, whose first update is not zero.

    residual = W - s * B @ A      the paper's frozen weight (LoftQ: the quantised weight Q)

The layer keeps W and computes y = W x + s B A x - D0 x. D0 = s0 B0 A0 is the first update (LoftQ: W - Q).
"""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.scaling import check_scaling
from ..core.update import Array, Factors
from ..numerics.arrays import library


def check_shape(method: str, shape: tuple[int, ...], r: int, scaling: float = 1.0) -> None:
    """Raise ValueError unless r <= min(in, out) and scaling > 0.

    >>> check_shape("pissa", (4, 8), r=6)
    Traceback (most recent call last):
    ...
    ValueError: init_lora_weights='pissa' needs r <= min(in, out) = 4, r=6 is more
    """
    if r > min(shape):
        raise ValueError(f"init_lora_weights={method!r} needs r <= min(in, out) = {min(shape)}, r={r} is more")
    if not scaling > 0:
        raise ValueError(f"init_lora_weights={method!r} divides by the scaling: lora_alpha must be > 0")


def factors_with_residual(
    weight: Float[Array, "out in"], A: Float[Array, "r in"], B: Float[Array, "out r"], scaling: float
) -> Factors:
    """A and B in the weight's dtype, and residual = W - s * B @ A of these rounded factors.

    Rounding them later would change the adapted weight. In a half precision that is far more than the rounding of
    the residual. ValueError: the dtype cannot hold a factor or the residual.

    >>> import numpy as np
    >>> factors_with_residual(np.eye(2), np.array([[2.0, 0.0]]), np.array([[1.0], [0.0]]), scaling=0.5).residual
    array([[0., 0.],
           [0., 1.]])
    """
    A, B = cast_factors(weight, A, B, scaling)
    residual: Any = numerics.subtract_product(weight, B, A, scaling)
    return Factors(A, B, numerics.cast_finite(residual, weight))


def cast_factors(
    weight: Float[Array, "out in"], A: Float[Array, "r in"], B: Float[Array, "out r"], scaling: float
) -> tuple[Float[Array, "r in"], Float[Array, "out r"]]:
    """A and B in the weight's dtype; ValueError if it cannot hold a factor, the product or the scaling."""
    largest = library(weight).finfo(numerics.at_least_float32(weight[:0]).dtype).max
    check_scaling(scaling, largest)
    A, B = numerics.cast_finite(A, weight), numerics.cast_finite(B, weight)
    if len(A) * float(abs(A).max()) * float(abs(B).max()) > largest:
        raise ValueError(f"B @ A is not finite at the start: with a scaling of {scaling:g} the factors are too large")
    return A, B
