"""Principal components of data that come in batches: exact, in one pass, without keeping the data.

    S = sum over all x of (x - mean) (x - mean)^T = V diag(sigma^2) V^T

The rows of V^T are the components, sigma the singular values of the centred data. S is kept, not
the data: `update` costs one product X^T X a batch, `components` one symmetric eigenproblem of any
size the data may have had. All of it is float64: squaring doubles the digits that a number needs, and
float64 has twice those of float32, so data in float32 or less lose nothing. What float64 data lose:
of a singular value below 1e-8 of the largest nothing is left.

Memory: 8 * in * min(in, number of rows seen) bytes, for S is not formed before it is smaller than
the rows themselves: 8 MiB at in = 1024, 128 MiB at 4096, 925 MiB at 11008. Where that is too much,
give fewer rows: k rows never take more than 8 * k * in bytes.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float
from threadpoolctl import threadpool_limits

from .. import numerics
from . import Array
from .arrays import library

EPS = 2.0**-52  # of float64
BLOCK = 256  # columns of a symmetric product that are computed at a time
SMALL = 256  # below this size a dense eigenproblem is as quick


class Moments(NamedTuple):
    """What is known of the rows seen: how many, their mean, and their scatter S about it.

    S is `kept` if `squared` (its upper triangle: S is symmetric), else kept^T @ kept, as long as that has fewer rows
    than columns.
    """

    seen: int
    mean: Float[Array, " in"]
    kept: Float[Array, "k in"]
    squared: bool


class Components(NamedTuple):
    """Components (n, in) with orthonormal rows, their singular values, and the part of the variance of each."""

    vectors: Float[Array, "n in"]
    singular_values: Float[Array, " n"]
    ratios: Float[Array, " n"]


def update(before: Moments | None, X: Float[Array, "m in"]) -> Moments:
    """The moments of the rows seen before (None: none) and the rows of X together.

        S <- S + (X - mean_X)^T (X - mean_X) + n m / (n + m) * d d^T,    d = mean_X - mean

    for n rows before and m now. Each batch is centred by its own mean before it is squared, so a mean
    that is large against the spread costs no digits. `before` is used up: its S is added to in place.

    Raises:
        ValueError: X has no rows, or a number in it is not finite.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample
        variances", 1979; the extra row is that of Ross et al., "Incremental learning for robust visual
        tracking", 2008, which scikit-learn's IncrementalPCA follows.

    >>> moments = update(update(None, np.array([[1.0, 5.0]])), np.array([[3.0, 5.0], [5.0, 5.0]]))
    >>> moments.seen, moments.mean, moments.kept
    (3, array([3., 5.]), array([[8., 0.],
           [0., 0.]]))
    """
    xp = library(X)
    m, n_in = X.shape
    if m == 0:
        raise ValueError("there are no rows to learn from")
    X = X.detach().to(xp.float64) if numerics.is_torch(X) else X.astype(np.float64)
    mean = X.mean(0)
    if not xp.isfinite(mean).all():
        raise ValueError("the data hold NaN or infinite numbers, or their sum overflows")
    rows, seen = X - mean, m
    if before is not None:
        seen, d = before.seen + m, mean - before.mean
        rows = xp.concatenate([rows, math.sqrt(before.seen * m / seen) * d[None]])  # its square is the last term
        mean = before.mean + (m / seen) * d
        if before.squared:
            _add_gram(before.kept, rows)
            return before._replace(seen=seen, mean=mean)
        rows = xp.concatenate([before.kept, rows])
    squared = rows.shape[0] >= n_in
    kept = _add_gram(numerics.cast(numerics.zeros((n_in, n_in), rows), rows), rows) if squared else rows
    return Moments(seen, mean, kept, squared)


def components(moments: Moments, n: int) -> Components:
    """The n leading components, by falling singular value: V^T (n, in), sigma (n,), sigma^2 / trace(S) (n,).

    In each row the entry of largest magnitude is positive. A sigma that is not to be told from 0 in
    float64 squares is 0, and its row some direction orthogonal to the others.

    Raises:
        ValueError: n is less than 1, or larger than the number of rows seen or of columns; S overflows.

    Source: equal to scikit-learn's IncrementalPCA of the same batches when that keeps all components. One
        that keeps n of them loses at every batch what lies in the others.

    >>> X = np.array([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]) + 100
    >>> vectors, singular_values, ratios = components(update(None, X), n=2)
    >>> abs(vectors), singular_values**2, ratios
    (array([[1., 0.],
           [0., 1.]]), array([8., 2.]), array([0.8, 0.2]))
    """
    seen, mean, kept, squared = moments
    n_in = mean.shape[0]
    if not 0 < n <= min(n_in, seen):
        raise ValueError(f"n={n} components of {seen} rows of {n_in} numbers: there are 1 to {min(n_in, seen)}")
    trace = kept.diagonal().sum() if squared else (kept**2).sum()
    if not math.isfinite(trace):
        raise ValueError("the data are so large that their squares leave float64: divide them by a common factor")
    if squared:
        xp = library(kept)
        values, V = leading_eigh(xp.triu(kept) + xp.triu(kept, 1).T, n)
    else:  # S = R^T R and the smaller R R^T = U diag(sigma^2) U^T have the same sigma, and V diag(sigma) = R^T U
        values, U = leading_eigh(kept @ kept.T, n)
        V = numerics.qr(kept.T @ U)[0]  # (in, k) @ (k, n) -> (in, n), orthonormal even where sigma is 0
    values = values * (values > n_in * EPS * values[0])
    rows = V.T * _signs(V)[:, None]
    return Components(rows, values**0.5, values / trace if trace > 0 else values)


def leading_eigh(C: Float[Array, "d d"], n: int) -> tuple[Float[Array, " n"], Float[Array, "d n"]]:
    """The n largest eigenvalues of a positive semidefinite matrix, falling, and their eigenvectors as columns.

    On the CPU by Lanczos where n is small against d. It can miss some of several equal eigenvalues, so it has
    to prove itself: the residuals |C v - lambda v| are small, and a Cholesky factorisation shows that without
    these pairs no larger eigenvalue is left. Where it fails, and on other devices, by a dense decomposition.

    >>> leading_eigh(np.diag([1.0, 3.0, 2.0]), 2)[0]
    array([3., 2.])
    """
    C, e = numerics.near_one(C)
    if numerics.is_torch(C) and C.device.type != "cpu":
        values, V = sys.modules["torch"].linalg.eigh(C)
        return numerics.times_power(values[-n:].flip(0).clamp(min=0), e), V[:, -n:].flip(1)
    c = np.asarray(C)  # a tensor on the CPU is read where it lies
    as_given = sys.modules["torch"].from_numpy if numerics.is_torch(C) else np.asarray
    found = _lanczos(c, n) if len(c) > SMALL and 8 * n <= len(c) else None
    if found is None or not _are_leading(C, *map(as_given, found)):
        found = scipy.linalg.eigh(c, subset_by_index=[len(c) - n, len(c) - 1])
    return as_given(numerics.times_power(np.maximum(found[0][::-1], 0), e)), as_given(found[1][:, ::-1].copy())


def _lanczos(c: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray] | None:
    """n leading eigenpairs, rising; None where they do not converge soon (a dense decomposition is as quick)."""
    start = np.random.default_rng(0).standard_normal(len(c))
    try:
        with threadpool_limits(1, user_api="blas"):  # NumPy's threads and torch's, each waiting in turn, cost far more
            return scipy.sparse.linalg.eigsh(c, n, which="LA", v0=start, maxiter=10)
    except scipy.sparse.linalg.ArpackError:
        return None


def _are_leading(C: Float[Array, "d d"], values: Float[Array, " n"], V: Float[Array, "d n"]) -> bool:
    """Are these eigenpairs (rising), and C - V diag(values) V^T <= values[0] (1 + rounding) I?"""
    n, xp, VL, ii = len(C), library(C).linalg, V * values, list(range(len(C)))
    allowed = n * EPS * values[-1]
    rest = VL @ V.T - C  # (d, n) @ (n, d) -> (d, d)
    rest[ii, ii] += values[0] + allowed
    try:
        xp.cholesky(rest)  # exists for positive definite matrices only
    except xp.LinAlgError:
        return False
    return bool(xp.norm(C @ V - VL) <= allowed)


def _add_gram(S: Float[Array, "d d"], X: Float[Array, "k d"]) -> Float[Array, "d d"]:
    """S += X^T X in place, but for what is left of the blocks on the diagonal: nearly half of the work."""
    for i in range(0, len(S), BLOCK):
        S[i : i + BLOCK, i:] += X[:, i : i + BLOCK].T @ X[:, i:]
    return S


def _signs(V: Float[Array, "d n"]) -> Float[Array, " n"]:
    """The sign of the entry of largest magnitude in each column."""
    largest = V[abs(V).argmax(0), range(V.shape[1])]
    return largest / abs(largest)
