"""One spelling for the array work that NumPy and torch spell differently.

NumPy arrays go to SciPy and stay in float64 (the oracle); torch tensors go to
`torch.linalg`, in at least float32 (half precision has no decompositions). Importing
this module does not import torch: a tensor can only arrive if torch is there already.
"""

import sys
from typing import Any

import numpy as np
from jaxtyping import Float

Array = Any  # a numpy.ndarray or a torch.Tensor


def is_torch(x: Array) -> bool:
    """True for a torch tensor, False for a NumPy array.

    >>> is_torch(np.zeros(2))
    False
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def at_least_float32(x: Array) -> Array:
    """x itself in float32 or float64, x cast to float32 in a half precision."""
    return x.float() if is_torch(x) and x.dtype.itemsize < 4 else x


def qr(x: Float[Array, "*batch n k"]) -> tuple[Float[Array, "*batch n m"], Float[Array, "*batch m k"]]:
    """X = Q R, reduced: Q^T Q = I, R upper triangular.

    The signs are fixed: R's diagonal is >= 0, so that Q and R are unique for full rank.

    >>> Q, R = qr(np.array([[0.0, 2.0], [-3.0, 1.0]]))
    >>> R
    array([[ 3., -1.],
           [ 0.,  2.]])
    """
    if is_torch(x):
        torch = sys.modules["torch"]
        Q, R = torch.linalg.qr(at_least_float32(x))
        sign = torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(R.dtype)
    else:
        Q, R = np.linalg.qr(x)
        sign = np.where(R.diagonal(axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return Q * sign[..., None, :], sign[..., :, None] * R


def svd(
    x: Float[Array, "*batch n k"],
) -> tuple[Float[Array, "*batch n m"], Float[Array, "*batch m"], Float[Array, "*batch m k"]]:
    """X = U diag(S) Vh, thin: m = min(n, k), S descending.

    >>> U, S, Vh = svd(np.array([[3.0, 0.0], [0.0, -5.0]]))
    >>> S
    array([5., 3.])
    """
    if is_torch(x):
        return sys.modules["torch"].linalg.svd(at_least_float32(x), full_matrices=False)
    return np.linalg.svd(x, full_matrices=False)


def svd_of_product(
    B: Float[Array, "*batch out r"], A: Float[Array, "*batch r in"]
) -> tuple[Float[Array, "*batch out m"], Float[Array, "*batch m"], Float[Array, "*batch m in"]]:
    """B A = U diag(S) Vh without forming B A: QR both factors, decompose the small core.

        B = Qb Rb,  A^T = Qa Ra,  B A = Qb (Rb Ra^T) Qa^T,  m = min(out, r, in)

    O((in + out) r^2) operations instead of O(in * out * min(in, out)).

    >>> U, S, Vh = svd_of_product(np.array([[3.0], [4.0]]), np.array([[0.0, 2.0, 0.0]]))
    >>> S
    array([10.])
    """
    Qb, Rb = qr(B)  # (out, m), (m, r)
    Qa, Ra = qr(A.mT if is_torch(A) else A.swapaxes(-1, -2))  # (in, m'), (m', r)
    U, S, Vh = svd(Rb @ (Ra.mT if is_torch(Ra) else Ra.swapaxes(-1, -2)))
    return Qb @ U, S, Vh @ (Qa.mT if is_torch(Qa) else Qa.swapaxes(-1, -2))


def zeros(shape: tuple[int, ...], like: Array) -> Array:
    """Zeros in the library of `like`, where and as `normal` draws."""
    if is_torch(like):
        return sys.modules["torch"].zeros(shape, device=_drawing_device(like))
    return np.zeros(shape)


def normal(shape: tuple[int, ...], std: float, like: Array, rng: Any = None) -> Array:
    """Draws of N(0, std^2) in the library of `like`.

    NumPy: float64 from `rng`, a `numpy.random.Generator` (None: a fresh one). torch: the
    default dtype from `rng`, a `torch.Generator` (None: the global one), drawn on the CPU
    whatever the device of `like`, so that a seed gives the same adapter on every device.
    """
    if is_torch(like):
        draw = sys.modules["torch"].empty(shape, device=_drawing_device(like))
        return draw.normal_(0, std, generator=rng)
    return (rng or np.random.default_rng()).normal(0.0, std, shape)


def uniform(shape: tuple[int, ...], bound: float, like: Array, rng: Any = None) -> Array:
    """Draws of U(-bound, bound) in the library of `like`; see `normal`."""
    if is_torch(like):
        draw = sys.modules["torch"].empty(shape, device=_drawing_device(like))
        return draw.uniform_(-bound, bound, generator=rng)
    return (rng or np.random.default_rng()).uniform(-bound, bound, shape)


def _drawing_device(like: Array) -> str:
    return "meta" if like.device.type == "meta" else "cpu"  # a meta weight has no numbers to start from
