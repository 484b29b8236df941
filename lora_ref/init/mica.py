"""`init_lora_weights="mica"`: adapt the weight where it acts least, along its minor left singular vectors."""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from .residual import check


def mica(weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """B = U[:, -r:], A = 0, where W = U S Vh (thin): the left singular vectors of the r smallest values.

    The start is a no-op and the base weight stays as it is. Only A is meant to train: B, frozen, fixes
    the subspace in which the update lives. For an embedding W is the logical weight, (dim, vocabulary).

    Smallest singular values need the whole decomposition: eigenvectors of W W^T would be cheaper
    but lose them in rounding, since their squares drown beside the largest.

    Raises:
        ValueError: r > min(in, out), or entries of W that are not finite.

    Source: MiCA, arXiv 2604.01694.

    Differs from PEFT: the signs are fixed; float64 is accepted.

    >>> import numpy as np
    >>> A, B, residual, _ = mica(np.array([[3.0, 0.0], [0.0, -5.0]]), r=1)
    >>> A, B.T, residual
    (array([[0., 0.]]), array([[1., 0.]]), None)
    """
    check("mica", weight.shape, r)
    U, _, _ = numerics.svd(weight)  # (out, min(in, out))
    B = numerics.cast(U[:, -r:], weight)
    return Factors(numerics.cast(numerics.zeros((r, weight.shape[1]), weight), weight), B)
