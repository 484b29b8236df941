"""`init_lora_weights="orthogonal"`: A and B are not zero, their product B A is."""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors


def orthogonal(weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A = (X P)^T / 10, B = Y Q / 10, where P and Q are the even and the odd rows of a random orthogonal matrix.

    P and Q are (r/2, r). X (in, r/2) and Y (out, r/2) are standard normal. Rows of an orthogonal matrix are
    orthogonal to each other: Q P^T = 0, so B A = 0. The first update is zero, and both factors get gradients
    at the first step. But A and B have rank r/2 only. Neither of them is an orthogonal matrix.
    Raises: ValueError: r is odd.
    Source: PEFT's LoraConfig, `init_lora_weights="orthogonal"` (there is no paper).

    >>> import numpy as np
    >>> A, B, *_ = orthogonal(np.zeros((6, 8)), r=4, rng=np.random.default_rng(0))
    >>> (abs(B @ A) <= 8 * 4**2 * 2**-53 * (abs(B) @ abs(A))).all()  # zero but for rounding in the QR decomposition
    np.True_
    >>> np.linalg.matrix_rank(A), np.linalg.matrix_rank(B)
    (np.int64(2), np.int64(2))
    """
    check_even(r)
    n_out, n_in = weight.shape
    rows, _ = numerics.qr(numerics.draw_normal((r, r), 1.0, weight, rng))
    X = numerics.draw_normal((n_in, r // 2), 0.1, weight, rng)
    Y = numerics.draw_normal((n_out, r // 2), 0.1, weight, rng)
    return Factors(A=(X @ rows[0::2]).T, B=Y @ rows[1::2])  # (in, r/2) @ (r/2, r) -> (in, r); likewise (out, r)


def check_even(r: int) -> None:
    """Raise ValueError unless r is even."""
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, r={r} is odd")
