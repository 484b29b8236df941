"""`init_lora_weights="olora"`: A and B from the QR decomposition of the weight."""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from .residual import check_shape, factors_with_residual


def olora(weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """B = Q[:, :r], A = R[:r], where W = Q R. residual = W - s B A (the paper's frozen weight).

    B^T B = I. A is upper trapezoidal with a diagonal >= 0. With s = 1 the first r columns of the residual are zero.
    A and B do not depend on s. The first r columns of W determine Q[:, :r], and R[:r] = Q[:, :r]^T W. So the cost is
    O(in * out * r), and only the residual has the size of W.
    Raises: ValueError: r > min(in, out), scaling <= 0, W is not finite, or the dtype cannot hold the factors.
    Source: OLoRA, arXiv 2406.01775, section 3, algorithm 1.
    Differs from PEFT: fixed signs. float64 is accepted. In half precision the residual belongs to the rounded factors.

    >>> import numpy as np
    >>> A, B, residual, _ = olora(np.array([[0.0, 2.0], [-3.0, 1.0]]), r=1)
    >>> A, B.T, residual
    (array([[ 3., -1.]]), array([[-0., -1.]]), array([[0., 2.],
           [0., 0.]]))
    """
    check_shape("olora", weight.shape, r, scaling)
    W = numerics.at_least_float32(weight)
    numerics.check_finite(W)
    B, R = numerics.qr(W[:, :r])  # (out, r), (r, r)
    A = B.T @ W  # (r, out) @ (out, in) -> (r, in)
    A[:, :r] = R  # equal but for rounding, with exact zeros below the diagonal
    return factors_with_residual(weight, A, B, scaling)
