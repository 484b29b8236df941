"""`init_lora_weights="pissa"` and `"pissa_niter_<n>"`: train the principal part of the weight, freeze the rest."""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from .residual import check, take_out


def pissa(
    weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None, niter: int | None = None
) -> Factors:
    """B = U_r sqrt(S_r / s), A = sqrt(S_r / s) Vh_r, where W = U S Vh; the base becomes W - s * B @ A.

    So s * B @ A is the best approximation of W of rank r (Eckart-Young), whatever s, and the
    residual has the remaining singular values: B^T residual = 0, residual A^T = 0. Row k of A and
    column k of B have the same norm, sqrt(S_k / s).

    niter=None: exact, by `numerics.leading_svd`. niter=n: the randomised approximation with n subspace
    iterations; W = residual + s * B @ A holds all the same. It draws from `rng`, or with a fixed seed.

    Raises:
        ValueError: r > min(in, out), scaling <= 0, entries of W that are not finite, factors that
            the dtype cannot hold.

    Source: PiSSA, arXiv 2404.02948, equations 2 to 4.

    Differs from PEFT: float64 is accepted; in half precision the residual is that of the factors as
    rounded; niter draws more columns than r, from a fixed seed.

    >>> import numpy as np
    >>> W = np.array([[3.0, 0.0], [0.0, -5.0]])
    >>> A, B, residual, _ = pissa(W, r=1, scaling=5.0)
    >>> A, B.T, residual
    (array([[0., 1.]]), array([[-0., -1.]]), array([[3., 0.],
           [0., 0.]]))
    """
    check("pissa", weight.shape, r, scaling)
    if niter is None:
        U, S, Vh = numerics.leading_svd(weight, r)
    else:
        U, S, Vh = numerics.randomized_svd(weight, r, niter, rng)
    root = S**0.5 / scaling**0.5  # not of S / scaling, which may be too small or large for S's dtype
    return take_out(weight, root[:, None] * Vh, U * root, scaling)
