"""The leading singular triples of a big matrix, exactly or approximately, without those that nobody needs."""

from typing import Any

from jaxtyping import Float

from ..core.update import Array, at_least_float32
from .arrays import cast, library, near_one, seeded_normal, times_power
from .dense import qr, signed, svd

LONGEST_BASIS, KEPT = 16, 4  # blocks in a Krylov basis, and blocks that a restart keeps
PATIENCE = 128  # products with W before the dense decomposition is the better choice


def leading_svd(
    W: Float[Array, "out in"], r: int
) -> tuple[Float[Array, "out r"], Float[Array, " r"], Float[Array, "r in"]]:
    """The r leading triples of `svd(W)`.

    As exact as the dense decomposition and, for r much smaller than W, 10 to 100 times faster:
    `_block_krylov` needs products with W only, a few dozen times r of them. Its answer is verified; where
    that fails, and where r is not small against W, the dense decomposition answers.

    Raises:
        ValueError: W has NaN or infinite entries.

    >>> import numpy as np
    >>> U, S, Vh = leading_svd(np.array([[3.0, 0.0], [0.0, -5.0]]), r=1)
    >>> S, Vh
    (array([5.]), array([[0., 1.]]))
    """
    W, e = near_one(at_least_float32(W))
    width = max(r, 8)
    if LONGEST_BASIS * width <= min(W.shape) // 2:
        start = seeded_normal((W.shape[1], width), W, seed=0)
        tolerance = float(library(W).finfo(W.dtype).eps) * max(64, sum(W.shape) ** 0.5)
        triples = _block_krylov(W, start, r, tolerance / 4)
        if triples and _are_leading(W, *triples, tolerance):
            U, S, Vh = signed(*triples)
            return U, times_power(S, e), Vh
    U, S, Vh = svd(W)
    return U[:, :r], times_power(S[:r], e), Vh[:r]


def _block_krylov(W: Array, X: Array, r: int, tolerance: float) -> tuple[Array, Array, Array] | None:
    """The r leading triples of W by block Lanczos bidiagonalisation with thick restarts; None without convergence.

    Orthonormal bases V and U grow by a block at a time, from a random block X on:

        U_j = W V_j,   V_(j+1) = W^T U_j,   both orthogonalised against all before them

    so that W V = U H, and the leading triples of the small H = U^T W V soon give those of W. W^T U = V H^T
    but for the newest block: that part tells the error of each triple. When the bases are long, their best
    part replaces them. A block of at least r columns finds r equal singular values at once, to which
    a single vector is blind.

    Source: Golub, Luk, Overton, 1981, doi 10.1145/355945.355946 (blocks);
    Baglama, Reichel, 2005, doi 10.1137/04060593X (restarts).
    """
    xp = library(X)
    width, check_at = X.shape[1], 1
    V, U, H = X[:, :0], W[:, :0], X[:0, :0]
    for _ in range(PATIENCE):
        X = _orthonormal(X, V)
        V, WX = xp.concatenate([V, X], 1), _times(W, X)
        Y = _orthonormal(WX, U)
        Z = _times(W.T, Y)
        H = xp.concatenate([xp.concatenate([H, U.T @ WX], 1), Z.T @ V], 0)  # U^T W V
        U = xp.concatenate([U, Y], 1)
        X = Z - V @ H[-width:].T  # (in, width), what W^T U has outside the range of V
        blocks = V.shape[1] // width
        if blocks < check_at:
            continue
        P, S, Qh = svd(H)
        if xp.linalg.norm(X @ P[-width:, :r], axis=0).max() <= tolerance * S[0]:  # W^T u - s v
            return U @ P[:, :r], S[:r], Qh[:r] @ V.T
        check_at = min(blocks + max(blocks // 2, 1), LONGEST_BASIS)
        if blocks == LONGEST_BASIS:
            kept = KEPT * width
            V, U, H = V @ Qh[:kept].T, U @ P[:, :kept], xp.diag(S[:kept])
    return None


def _are_leading(W: Array, U: Array, S: Array, Vh: Array, tolerance: float) -> bool:
    """Are these singular triples of W, and is there no larger one beside them?"""
    norm, eye = library(S).linalg.norm, cast(library(S).eye(len(S)), S)
    defects = [U.T @ U - eye, Vh @ Vh.T - eye]
    errors = [_times(W, Vh.T) - U * S, _times(W.T, U) - Vh.T * S]
    X = seeded_normal((Vh.shape[1], 8), S, seed=1)  # another random block, for what the first may have missed
    for _ in range(2):
        X = _times(W.T, _times(W, _orthonormal(X, Vh.T)))
    largest_left = norm(_times(W, _orthonormal(X, Vh.T)), axis=0).max()
    return bool(
        all(norm(x, axis=0).max() <= tolerance for x in defects)
        and all(norm(x, axis=0).max() <= tolerance * S[0] for x in errors)
        and largest_left <= S[-1] + tolerance * S[0]
    )


def _times(W: Array, X: Array) -> Array:
    return (X.T @ W.T).T  # W @ X; with the thin factor in front, BLAS libraries are up to 40 times faster


def _orthonormal(X: Array, basis: Array) -> Array:
    """An orthonormal basis of the columns of X, orthogonal to those of `basis`: twice is enough."""
    for _ in range(2):
        X, _ = qr(X - basis @ _times(basis.T, X))
    return X


def randomized_svd(
    W: Float[Array, "out in"], r: int, niter: int, rng: Any = None
) -> tuple[Float[Array, "out r"], Float[Array, " r"], Float[Array, "r in"]]:
    """About the r leading triples: those of W seen through the range of (W W^T)^niter W X, X random (in, r + 8).

        Q = an orthonormal basis of that range,   Q^T W = U S Vh,   W ~ (Q U) S Vh

    The 8 columns more than r, and the orthogonalisation after every product, are what make few
    iterations enough. X is drawn with a fixed seed unless `rng` is given.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.

    >>> import numpy as np
    >>> U, S, Vh = randomized_svd(np.diag([9.0, 3.0, 1.0]), r=2, niter=0)
    >>> S.round(6)
    array([9., 3.])
    """
    W, e = near_one(at_least_float32(W))
    width = min(r + 8, *W.shape)
    Q, _ = qr(_times(W, seeded_normal((W.shape[1], width), W, seed=0, rng=rng)))  # (out, width)
    for _ in range(niter):
        Z, _ = qr(_times(W.T, Q))  # (in, width)
        Q, _ = qr(_times(W, Z))
    U, S, Vh = svd(Q.T @ W)  # (width, in)
    return Q @ U[:, :r], times_power(S[:r], e), Vh[:r]
