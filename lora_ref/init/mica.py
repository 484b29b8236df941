"""`init_lora_weights="mica"`: B from the left singular vectors of the smallest singular values."""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from .residual import check_shape


def mica(weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """B = U[:, -r:], A = 0, where W = U S Vh (thin): the left singular vectors of the r smallest singular values.

    The first update is zero. Only A is trained. B is frozen, so every update lies in the column space of B.
    For an embedding W is the logical weight, (dim, vocabulary).
    This needs the full SVD. Eigenvectors of W W^T cost less, but rounding hides the squares of small singular values.
    Raises: ValueError: r > min(in, out), or W is not finite.
    Source: MiCA, arXiv 2604.01694.
    Differs from PEFT: fixed signs. float64 is accepted.

    >>> import numpy as np
    >>> A, B, residual, _ = mica(np.array([[3.0, 0.0], [0.0, -5.0]]), r=1)
    >>> A, B.T, residual
    (array([[0., 0.]]), array([[1., 0.]]), None)
    """
    check_shape("mica", weight.shape, r)
    U, _, _ = numerics.svd(weight)  # (out, min(in, out))
    B = numerics.cast(U[:, -r:], weight)
    return Factors(numerics.cast(numerics.zeros((r, weight.shape[1]), weight), weight), B)
