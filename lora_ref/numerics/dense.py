"""QR and SVD of one matrix or of a batch, by LAPACK. The signs are fixed."""

import numpy as np
from jaxtyping import Float

from ..core.update import Array, at_least_float32, is_torch
from .arrays import cast, check_finite, library, scaled_to_one, times_2_to_the

# U, S and Vh: m singular triples of a matrix (n, k), or of a batch
Triples = tuple[Float[Array, "*batch n m"], Float[Array, "*batch m"], Float[Array, "*batch m k"]]


def subtract_product(
    W: Float[Array, "out in"], B: Float[Array, "out r"], A: Float[Array, "r in"], s: float
) -> Float[Array, "out in"]:
    """W - s * B @ A, computed and returned in at least float32. The result is the only new array of W's size.

    >>> subtract_product(np.eye(2), np.array([[1.0], [0.0]]), np.array([[1.0, 3.0]]), 2.0)
    array([[-1., -6.],
           [ 0.,  1.]])
    """
    W, A, B = at_least_float32(W), at_least_float32(A), at_least_float32(B)
    if is_torch(W):
        return W.addmm(B, A, alpha=-s)
    D = B @ (-s * A)  # (out, r) @ (r, in) -> (out, in)
    D += W
    return D


def qr(x: Float[Array, "*batch n k"]) -> tuple[Float[Array, "*batch n m"], Float[Array, "*batch m k"]]:
    """X = Q R with Q^T Q = I and R upper triangular; reduced: m = min(n, k). In at least float32.

    The diagonal of R is >= 0. So Q and R are unique where X has full rank.

    >>> Q, R = qr(np.array([[0.0, 2.0], [-3.0, 1.0]]))
    >>> R
    array([[ 3., -1.],
           [ 0.,  2.]])
    """
    Q, R = library(x).linalg.qr(at_least_float32(x))
    sign = 1 - 2 * cast(R.diagonal(0, -2, -1) < 0, R)
    return Q * sign[..., None, :], sign[..., :, None] * R


def svd(x: Float[Array, "*batch n k"]) -> Triples:
    """X = U diag(S) Vh, thin: m = min(n, k); S descends. In each row of Vh the entry of largest magnitude is positive.

    Raises: ValueError: x has NaN or infinite entries.

    >>> U, S, Vh = svd(np.array([[3.0, 0.0], [0.0, -5.0]]))
    >>> S
    array([5., 3.])
    """
    check_finite(x)
    return signed(*library(x).linalg.svd(at_least_float32(x), full_matrices=False))


def signed(U: Array, S: Array, Vh: Array) -> tuple[Array, Array, Array]:
    """The same triples, with signs such that in each row of Vh the entry of largest magnitude is positive."""
    at = abs(Vh).argmax(-1)[..., None]  # (*batch, m, 1)
    largest = Vh.take_along_dim(at, -1) if is_torch(Vh) else np.take_along_axis(Vh, at, -1)
    sign = largest / abs(largest)
    return U * sign.swapaxes(-1, -2), S, Vh * sign


def svd_of_product(B: Float[Array, "*batch n r"], A: Float[Array, "*batch r k"]) -> Triples:
    """B A = U diag(S) Vh, thin: m = min(n, r, k); without the product B A.

        B = Qb Rb,  A^T = Qa Ra,  B A = Qb (Rb Ra^T) Qa^T

    Only the small matrix Rb Ra^T is decomposed: O((n + k) r^2) operations instead of O(n k min(n, k)).
    Raises: ValueError: B or A are not finite.

    >>> U, S, Vh = svd_of_product(np.array([[3.0], [4.0]]), np.array([[0.0, 2.0, 0.0]]))
    >>> S
    array([10.])
    """
    (B, b), (A, a) = scaled_to_one(at_least_float32(B)), scaled_to_one(at_least_float32(A))
    Qb, Rb = qr(B)  # (n, m), (m, r)
    Qa, Ra = qr(A.swapaxes(-1, -2))  # (k, m'), (m', r)
    U, S, Vh = svd(Rb @ Ra.swapaxes(-1, -2))
    return Qb @ U, times_2_to_the(S, a + b), Vh @ Qa.swapaxes(-1, -2)
