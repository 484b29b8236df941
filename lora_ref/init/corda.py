"""`init_lora_weights="corda"`: the directions of a weight that matter most (or least) for given data.

PiSSA decomposes W. CorDA decomposes W C, where C is the covariance of the inputs x. "ipm" uses the leading directions,
to learn the task of x. "kpm" uses the last ones, to change the outputs for x as little as possible.
"""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from ..numerics.arrays import library, seeded_normal
from . import residual

PROBES = 16


def corda(
    weight: Float[Array, "out in"],
    r: int,
    scaling: float = 1.0,
    rng: Any = None,
    *,
    covariance: Float[Array, "in in"],
    corda_method: str = "ipm",
) -> Factors:
    """s * B A = U_r S_r V_r^T C'^-1 = U_r U_r^T W, where U S V^T = W C' and C' is C, damped.

        B = U_r sqrt(S_r / s),  A = U_r^T W / sqrt(S_r s),  residual = W - s B A (the paper's frozen weight)

    U_r^T U S V^T = S_r V_r^T, so S_r V_r^T C'^-1 = U_r^T W, and no inverse is needed. The update projects W onto
    r directions of its output. The covariance only selects them: "ipm" the r largest of the min(in, out) singular
    triples, "kpm" the r smallest. The product does not depend on s, nor on the scale of C.
    Raises: ValueError: r > min(in, out), scaling <= 0, an unknown corda_method, a covariance that is zero or not
    finite, or the dtype cannot hold the factors.
    Source: CorDA, arXiv 2406.05223, section 3 and algorithm 1.
    Differs from PEFT: no inverse of C' and no full SVD, so it is faster and rounds less. float64 is accepted. A
    direction with S = 0 (W has a lower rank) gives zeros, not a division by zero.

    >>> import numpy as np
    >>> W, C = np.array([[3.0, 0.0], [0.0, 2.0]]), np.diag([1.0, 9.0])
    >>> A, B, residual, _ = corda(W, r=1, covariance=C)  # 2 * 9 > 3 * 1: the second output matters more
    >>> (B @ A).round(12), residual.round(12)
    (array([[0., 0.],
           [0., 2.]]), array([[3., 0.],
           [0., 0.]]))
    """
    residual.check_shape("corda", weight.shape, r, scaling)
    return project_weight(weight, *output_directions(weight, damp(covariance), r, corda_method), scaling)


def call_covariance(x: Float[Array, "*tokens in"]) -> Float[Array, "in in"]:
    """X^T X with X = x / max|x|, in at least float32: one call of a layer, as a part of its covariance.

    All leading dimensions count tokens. The mean is not subtracted, so this is a second moment.
    Source: CorDA, arXiv 2406.05223, section 3; the division by max|x| is from the authors' code.
    Differs from PEFT: PEFT divides by |max x|, which is 0 if max x is. There only batches of one sample work.

    >>> import numpy as np
    >>> call_covariance(np.array([[1.0, -2.0], [0.0, 2.0]]))
    array([[ 0.25, -0.5 ],
           [-0.5 ,  2.  ]])
    """
    X = numerics.at_least_float32(x.reshape(-1, x.shape[-1]))  # (tokens, in)
    peak = abs(X).max() if len(X) else 0.0
    X = X / (peak + (peak == 0))  # inputs that are all zero stay as they are
    return X.T @ X  # (in, tokens) @ (tokens, in) -> (in, in)


def damp(covariance: Float[Array, "in in"]) -> Float[Array, "in in"]:
    """C' = C + d * mean(diag C) * I with the first d of .01, .02, .04, ... for which ||C' C'^-1 - I||_F < .05.

    With fewer tokens than inputs C is singular. The condition number of C' is at most 1 + in / d. In float64 d is
    always .01. In float32 it may double for a C of 2,000 rows or more. The norm is estimated without an inverse. It was
    never measured above 7 u ||C'||_F ||C'^-1||_2, and ||C'^-1||_2 <= 1 / (d mean). If that does not suffice, 16 z are
    drawn: E ||(C' X - I) z||^2 = ||C' X - I||_F^2 for z ~ N(0, I) (Hutchinson), where X z solves C' x = z. A large norm
    comes from 1 / (d mean), so doubling d halves it.
    Raises: ValueError: C is zero or not finite, or has a negative number on its diagonal.
    Source: PEFT's preprocess_corda; the authors' code has the same loop.
    Differs from PEFT: the norm is estimated, to 30 % at worst. Near .05, d may differ by a factor of two.

    >>> import numpy as np
    >>> damp(np.diag([1.0, 3.0]))
    array([[1.02, 0.  ],
           [0.  , 3.02]])
    """
    C = numerics.at_least_float32(covariance)
    if not (numerics.is_finite(C) and C.diagonal().min() >= 0 and C.diagonal().max() > 0):
        wrong = "the covariance of the inputs is zero, or not finite, or has a negative variance"
        raise ValueError(f"{wrong}: it does not say which directions matter")
    C, e = numerics.scaled_to_one(C)
    xp, mean, damping = library(C), float(C.diagonal().mean()), 0.01
    D, ii = C + 0, list(range(len(C)))
    D[ii, ii] += damping * mean
    error = 10 * float(xp.finfo(C.dtype).eps) / 2 * xp.linalg.norm(D) / (damping * mean)
    if error >= 0.05:
        Z = seeded_normal((len(C), PROBES), C, seed=0)
        error = xp.linalg.norm(D @ xp.linalg.solve(D, Z) - Z) / PROBES**0.5  # (in, in) @ (in, probes)
    while error >= 0.05:
        D[ii, ii] += damping * mean  # now twice the damping
        damping, error = 2 * damping, error / 2
    return numerics.times_2_to_the(D, e)


def output_directions(
    weight: Float[Array, "out in"], covariance: Float[Array, "in in"], r: int, corda_method: str = "ipm"
) -> tuple[Float[Array, "out r"], Float[Array, " r"]]:
    """U_r and S_r of W C: the r leading left singular vectors ("ipm") or the last r ("kpm"). C is damped already.

    S_k is computed as |u_k^T W C|. So it belongs to u_k even if it is smaller than the rounding of W C.
    ValueError: an unknown corda_method; weight or covariance is not finite.

    >>> import numpy as np
    >>> output_directions(np.diag([3.0, 2.0]), np.diag([1.0, 9.0]), r=1, corda_method="kpm")
    (array([[1.],
           [0.]]), array([3.]))
    """
    W, w = numerics.scaled_to_one(numerics.at_least_float32(weight))
    C, c = numerics.scaled_to_one(numerics.cast(covariance, W))
    if corda_method not in ("ipm", "kpm"):
        raise ValueError(f"corda_method={corda_method!r}: must be 'ipm' or 'kpm'")
    G = W @ C  # (out, in) @ (in, in) -> (out, in)
    if corda_method == "ipm":
        U = numerics.leading_svd(G, r)[0]
    else:
        _, R = numerics.qr(G.T)  # G = R^T Q^T and the small R^T have the same left singular vectors
        U = numerics.svd(R.T)[0][:, -r:]
    S = ((U.T @ G) ** 2).sum(-1) ** 0.5  # (r, out) @ (out, in) -> (r, in), the norms of its rows
    return U, numerics.times_2_to_the(S, w + c)


def project_weight(
    weight: Float[Array, "out in"], U: Float[Array, "out r"], S: Float[Array, " r"], scaling: float
) -> Factors:
    """B = U sqrt(S / s), A = U^T W / sqrt(S s), residual = W - s * B A. Where S is 0, the row of A is 0.

    >>> import numpy as np
    >>> A, B, *_ = project_weight(np.diag([3.0, 2.0]), np.array([[0.0], [1.0]]), np.array([16.0]), scaling=4.0)
    >>> A, B.T
    (array([[0.  , 0.25]]), array([[0., 2.]]))
    """
    residual.check_shape("corda", weight.shape, U.shape[1], scaling)
    W = numerics.at_least_float32(weight)
    U, S = numerics.cast(U, W), numerics.cast(S, W)
    A = U.T @ W / (S + (S == 0))[:, None] ** 0.5 / scaling**0.5  # (r, out) @ (out, in) -> (r, in)
    largest = A[list(range(len(A))), abs(A).argmax(-1)]
    sign = 1 - 2 * (largest < 0)  # the largest entry of each row of A is positive
    return residual.factors_with_residual(weight, A * sign[:, None], U * (S**0.5 / scaling**0.5) * sign, scaling)
