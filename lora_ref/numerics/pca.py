"""Principal components of data that come in batches: exact, in one pass, without keeping the data.

    S = sum over all x of (x - mean) (x - mean)^T = V diag(sigma^2) V^T

The rows of V^T are the components. sigma holds the singular values of the centred data. `update` costs one product
X^T X a batch. `components` costs one symmetric eigenproblem, however many data there were.

Everything is float64. A square has twice as many digits as the number, and float64 has more than twice those of
float32. So data in float32 or less lose nothing. Of float64 data, singular values below 1e-8 of the largest are lost.

Memory: 8 * in * min(in, number of rows seen) bytes, because S is not formed while it is larger than the rows.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from .. import numerics
from . import Array
from .arrays import beside, library
from .dense import signed
from .leading import lanczos_svd

EPS = 2.0**-52  # of float64
BLOCK = 256  # columns of a symmetric product that are computed at a time


class Moments(NamedTuple):
    """The number of rows seen, their mean, and their scatter S about the mean.

    If `squared`, `kept` has the upper triangle of S. Otherwise S = kept^T @ kept, with fewer rows than columns.
    """

    seen: int
    mean: Float[Array, " in"]
    kept: Float[Array, "k in"]
    squared: bool


class Components(NamedTuple):
    """Components (n, in) with orthonormal rows, their singular values, and their shares of the variance."""

    vectors: Float[Array, "n in"]
    singular_values: Float[Array, " n"]
    ratios: Float[Array, " n"]


def update(before: Moments | None, X: Float[Array, "m in"]) -> Moments:
    """The moments of the rows seen before (None: none) and of the rows of X (m, in) together, in float64.

        S <- S + (X - mean_X)^T (X - mean_X) + n m / (n + m) * d d^T,    d = mean_X - mean

    n is the number of rows before, m that of X. Each batch is centred by its own mean before it is squared. So no
    digits are lost where the mean is large against the spread. S is changed in place: do not use `before` again.
    Raises: ValueError: X has no rows, or a number in it is not finite.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
        The row for d: Ross et al., "Incremental learning for robust visual tracking", 2008.

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
    """V^T (n, in), sigma (n,), sigma^2 / trace(S) (n,): the n leading components, by falling singular value.

    In each row the entry of largest magnitude is positive. A sigma^2 within the rounding of the largest counts as 0.
    Its row is an arbitrary direction orthogonal to the others.
    Raises: ValueError: n is less than 1, or larger than the number of rows seen or of columns; S overflows.
    Source: equal to scikit-learn's IncrementalPCA of the same batches, if that keeps all components.

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
    rows = signed(V, values, V.T)[2]
    return Components(rows, values**0.5, values / trace if trace > 0 else values)


def leading_eigh(C: Float[Array, "d d"], n: int) -> tuple[Float[Array, " n"], Float[Array, "d n"]]:
    """lambda (n,), falling, and V (d, n): C v = lambda v for the n largest eigenvalues of a positive semidefinite C.

    They are the leading singular triples of C. `lanczos_svd` computes them, or else `eigh`.

    >>> leading_eigh(np.diag([1.0, 3.0, 2.0]), 2)[0]
    array([3., 2.])
    """
    C, e = numerics.scaled_to_one(C)
    if found := lanczos_svd(C, n):
        return numerics.times_2_to_the(found[1], e), found[2].T
    d, xp = len(C), library(C)
    if numerics.is_torch(C) and C.device.type != "cpu":
        values, V = xp.linalg.eigh(C)
    else:  # computes these n vectors alone
        import scipy.linalg

        values, V = (beside(C, x) for x in scipy.linalg.eigh(np.asarray(C), subset_by_index=[d - n, d - 1]))
    values, V = xp.flip(values[-n:], (0,)), xp.flip(V[:, -n:], (1,))
    return numerics.times_2_to_the(values.clip(0), e), V


def _add_gram(S: Float[Array, "d d"], X: Float[Array, "k d"]) -> Float[Array, "d d"]:
    """S += X^T X in place, in the blocks on and above the diagonal. The others would be nearly half of the work."""
    for i in range(0, len(S), BLOCK):
        S[i : i + BLOCK, i:] += X[:, i : i + BLOCK].T @ X[:, i:]
    return S
