"""`init_lora_weights="olora"`: start from the QR decomposition of the weight, B with orthonormal columns."""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from .residual import check, take_out


def olora(weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """B = Q[:, :r], A = R[:r], where W = Q R; the base becomes W - s * B @ A.

    B^T B = I, and A is upper trapezoidal with a diagonal >= 0, the sign rule of QR. With s = 1 the
    residual begins with r zero columns. A and B do not depend on s; the residual does.

    The first r columns of Q come from the first r columns of W alone, and R[:r] = Q[:, :r]^T W, so
    the cost is O(in * out * r), not O(in * out * min(in, out)), and nothing of W's size is made but the residual.

    Raises:
        ValueError: r > min(in, out), scaling <= 0, entries of W that are not finite, factors that
            the dtype cannot hold.

    Source: OLoRA, arXiv 2406.01775, section 3, algorithm 1.

    Differs from PEFT: the signs are fixed; float64 is accepted; in half precision the residual is
    that of the factors as rounded.

    >>> import numpy as np
    >>> A, B, residual, _ = olora(np.array([[0.0, 2.0], [-3.0, 1.0]]), r=1)
    >>> A, B.T, residual
    (array([[ 3., -1.]]), array([[-0., -1.]]), array([[0., 2.],
           [0., 0.]]))
    """
    check("olora", weight.shape, r, scaling)
    W = numerics.at_least_float32(weight)
    numerics.check_finite(W)
    B, R = numerics.qr(W[:, :r])  # (out, r), (r, r)
    A = B.T @ W  # (r, out) @ (out, in) -> (r, in)
    A[:, :r] = R  # the same numbers, with zeros below the diagonal exactly
    return take_out(weight, A, B, scaling)
