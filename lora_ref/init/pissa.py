"""`init_lora_weights="pissa"` and `"pissa_niter_<n>"`: train the leading singular triples of the weight."""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from .residual import check_shape, factors_with_residual


def pissa(
    weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None, niter: int | None = None
) -> Factors:
    """B = U_r sqrt(S_r / s), A = sqrt(S_r / s) Vh_r, W = U S Vh. residual = W - s B A (the paper's frozen weight).

    For every s the update s B A is the best rank-r approximation of W (Eckart-Young). The residual has the other
    singular values: B^T residual = 0, residual A^T = 0. Row k of A and column k of B have the norm sqrt(S_k / s).
    niter=None: exact, by `numerics.leading_svd`. niter=n: the randomised SVD with n subspace iterations. It draws
    from `rng`, or from a fixed seed. W = residual + s B A holds for it too.
    Raises: ValueError: r > min(in, out), scaling <= 0, W is not finite, or the dtype cannot hold the factors.
    Source: PiSSA, arXiv 2404.02948, equations 2 to 4.
    Differs from PEFT: float64 is accepted. In half precision the residual belongs to the rounded factors. niter draws
    more columns than r, from a fixed seed.

    >>> import numpy as np
    >>> W = np.array([[3.0, 0.0], [0.0, -5.0]])
    >>> A, B, residual, _ = pissa(W, r=1, scaling=5.0)
    >>> A, B.T, residual
    (array([[0., 1.]]), array([[-0., -1.]]), array([[3., 0.],
           [0., 0.]]))
    """
    check_shape("pissa", weight.shape, r, scaling)
    if niter is None:
        U, S, Vh = numerics.leading_svd(weight, r)
    else:
        U, S, Vh = numerics.randomized_svd(weight, r, niter, rng)
    root = S**0.5 / scaling**0.5  # S / scaling may leave the range of the dtype
    return factors_with_residual(weight, root[:, None] * Vh, U * root, scaling)
