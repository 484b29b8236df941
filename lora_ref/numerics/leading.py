"""The r leading singular triples of a large matrix, exact or approximate, without the others."""

import inspect
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from threadpoolctl import ThreadpoolController

from ..core.update import Array, at_least_float32, is_torch
from .arrays import beside, detached, scaled_to_one, seeded_normal, times_2_to_the
from .dense import Triples, qr, signed, svd

SMALL = 256  # rows and columns: below, and for r above an eighth of them, the dense decomposition is as fast
PASSES = 8


def leading_svd(W: Float[Array, "n k"], r: int) -> Triples:
    """U_r (n, r), S_r (r,), Vh_r (r, k): the r leading triples of `svd(W)`, in at least float32.

    As exact as those of the dense decomposition, which is used where `lanczos_svd` returns None. No gradient flows.
    Raises: ValueError: W has NaN or infinite entries.

    >>> U, S, Vh = leading_svd(np.array([[3.0, 0.0], [0.0, -5.0]]), r=1)
    >>> S, Vh
    (array([5.]), array([[0., 1.]]))
    """
    W, e = scaled_to_one(at_least_float32(detached(W)))
    U, S, Vh = signed(*found) if (found := lanczos_svd(W, r)) else svd(W)
    return U[:, :r], times_2_to_the(S[:r], e), Vh[:r]


def lanczos_svd(W: Float[Array, "n k"], r: int) -> Triples | None:
    """The r leading triples by SciPy's ARPACK; None where `svd` is the better choice.

    V holds the right singular vectors found so far, none at first. Each pass adds to V the leading eigenvectors of

        P W^T W P,   P = I - V V^T

    from a new random start. Then W V = U diag(S) Q^T gives the best triples in the span of V, and V <- V Q. V keeps
    at most r vectors, those with |W^T u - s v| <= tolerance * S_1. The last pass is one that starts with r vectors and
    finds no s above S_r + tolerance * S_1. Further passes correct two errors of the first. Lanczos from one vector can
    miss copies of a repeated singular value. And W^T W squares them, so s has an error of S_1 / s roundings.

    The result is None for small matrices, for tensors that are not on the CPU, and where ARPACK would take longer than
    the dense decomposition. The starts are seeded. SciPy before 1.17 has no seed for an exhausted Krylov space.
    Source: Lehoucq, Sorensen, Yang, ARPACK Users' Guide, 1998, doi 10.1137/1.9780898719628.

    >>> W = np.diag(np.repeat([3.0, 2.0, 1.0], [4, 2, 400]))
    >>> _, S, _ = lanczos_svd(W, r=6)
    >>> S.round(9)
    array([3., 3., 3., 3., 2., 2.])
    """
    if max(SMALL, 8 * r) > min(W.shape) or (is_torch(W) and W.device.type != "cpu"):
        return None
    A = np.asarray(W)  # the memory of the tensor, not a copy
    if len(A) < A.shape[1]:
        found = lanczos_svd(W.T, r)
        return found and (found[2].T, found[1], found[0].T)
    U, S, V, allowed = A[:, :0], A[0, :0], np.zeros((A.shape[1], 0), A.dtype), 0.0
    tolerance = float(np.finfo(A.dtype).eps) * max(64, sum(A.shape) ** 0.5)
    try:
        for seed in range(PASSES):
            k = r - V.shape[1] or seed**2  # 1, then 4, 9, ...: where one copy was missed, there may be others
            start = np.random.default_rng(seed).standard_normal((len(V), k))
            # a pass that only looks for more may err by `allowed`
            error = float(allowed / S[-1]) if V.shape[1] == r and S[-1] > allowed else tolerance / 4
            largest, X = _largest(A, V, start.astype(A.dtype), error, allowed)
            if V.shape[1] == r and largest <= S[-1] + allowed:
                return beside(W, U), beside(W, S), beside(W, V.T)
            V, _ = np.linalg.qr(np.concatenate([V, X], 1))
            U, S, Qh = np.linalg.svd(A @ V, full_matrices=False)  # (out, in) @ (in, k)
            U, S, V = U[:, :r], S[:r], V @ Qh[:r].T
            allowed = tolerance * float(S[0])
            V = V[:, np.linalg.norm(A.T @ U - V * S, axis=0) <= allowed]
    except (arpack()[0].ArpackError, np.linalg.LinAlgError):  # they did not converge
        return None
    return None


def _largest(
    A: np.ndarray, V: np.ndarray, start: np.ndarray, tolerance: float, negligible: float
) -> tuple[float, np.ndarray]:
    """The largest singular value s of A P, and its k leading right singular vectors v (in, k), for a start (in, k).

    |P A^T A v - s^2 v| <= tolerance * s^2. Where A P is smaller than `negligible`, (0, some vectors).
    """

    def project(x: np.ndarray) -> np.ndarray:
        return x - V @ (V.T @ x)

    def product(x: np.ndarray) -> np.ndarray:
        x = project(x)
        return project(sum((rows @ x / size) @ rows / size for rows in parts))

    X = project(project(start))
    n, k = X.shape
    size = np.linalg.norm(A @ X[:, 0]) / np.linalg.norm(X[:, 0])  # size <= |A P|, and mostly |A P| <= sqrt(n) size
    if n**0.5 * size <= negligible:
        return 0.0, X
    parts = np.array_split(A, 1 + A.nbytes // 2**21) if A.flags.c_contiguous else [A]  # 2 MB stay in the cache
    scipy, seed, blas = arpack()
    operator = scipy.LinearOperator((n, n), product, dtype=A.dtype)  # its largest eigenvalue is above 1
    restarts = n // max(k, 20)  # about n products in all: with more, the dense decomposition is as fast
    with blas.limit(limits=1):
        values, X = scipy.eigsh(operator, k, v0=X[:, 0], tol=tolerance, maxiter=restarts, **seed)
    return float(size * max(values.max(), 0) ** 0.5), X


@cache
def arpack() -> tuple[Any, dict[str, Any], ThreadpoolController]:
    """scipy.sparse.linalg, the seed of its `eigsh`, and SciPy's BLAS. The import takes longer than that of lora_ref."""
    import scipy.sparse.linalg as found

    seed = {"rng": 0} if "rng" in inspect.signature(found.eigsh).parameters else {}
    # in many short products, the threads of the BLAS in SciPy's wheel would wait for each other and for NumPy's
    blas = ThreadpoolController().select(user_api="blas")
    files = [lib["filepath"] for lib in blas.info() if "scipy" in "".join(Path(lib["filepath"]).parts[-3:-1])]
    return found, seed, blas.select(filepath=files) if files else blas


def _times(W: Array, X: Array) -> Array:
    return (X.T @ W.T).T  # W @ X; with the thin factor in front, the BLAS of torch is up to 9 times faster


def randomized_svd(W: Float[Array, "n k"], r: int, niter: int, rng: Any = None) -> Triples:
    """Q U (n, r), S (r,), Vh (r, k): approximately the r leading triples of W, in at least float32.

        Q^T W = U diag(S) Vh,   Q an orthonormal basis of the range of (W W^T)^niter W X,   X (k, r + 8) random

    X has 8 columns more than r, and each product is orthogonalised. So few iterations are enough. rng=None is seeded.
    Raises: ValueError: W has NaN or infinite entries.
    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1.

    >>> U, S, Vh = randomized_svd(np.diag([9.0, 3.0, 1.0]), r=2, niter=0)
    >>> S.round(6)
    array([9., 3.])
    """
    W, e = scaled_to_one(at_least_float32(detached(W)))
    width = min(r + 8, *W.shape)
    Q, _ = qr(_times(W, seeded_normal((W.shape[1], width), W, seed=0, rng=rng)))  # (out, width)
    for _ in range(niter):
        Z, _ = qr(_times(W.T, Q))  # (in, width)
        Q, _ = qr(_times(W, Z))
    U, S, Vh = svd(Q.T @ W)  # (width, in)
    return Q @ U[:, :r], times_2_to_the(S[:r], e), Vh[:r]
