"""Weighted combinations: one adapter in place of several.

    cat     exact, rank sum(r_i)           A = [w_1 s_1 A_1; w_2 s_2 A_2; ...],  B = [B_1, B_2, ...]
    svd     best at a given rank           B A = the leading part of sum(w_i s_i B_i A_i)
    linear  same rank, NOT the sum         A = sum(sign sqrt|w_i s_i| A_i),  B = sum(sqrt|w_i s_i| B_i)

The factors contain the scale, so the scaling of the result is s = 1. These are pure functions on NumPy arrays and
torch tensors. `scales` are the products w_i * s_i of weight and scaling.
"""

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors

As = Sequence[Float[Array, "*batch _ in"]]
Bs = Sequence[Float[Array, "*batch out _"]]


def cat(As: As, Bs: Bs, scales: Sequence[float]) -> Factors:
    """B A = sum(w_i s_i B_i A_i), exactly, at rank sum(r_i).

    Source: PEFT's LoraModel.add_weighted_adapter, combination_type="cat".

    >>> A, B, *_ = cat([np.eye(2), np.ones((1, 2))], [np.eye(2), np.ones((2, 1))], [2.0, 0.5])
    >>> B @ A
    array([[2.5, 0.5],
           [0.5, 2.5]])
    """
    return Factors(_cat([s * A for s, A in zip(scales, As, strict=True)], -2), _cat(Bs, -1))


def linear(As: As, Bs: Bs, scales: Sequence[float]) -> Factors:
    """The sum of the factors, not of the updates: it has cross terms B_i A_j. For adapters that are similar.

    Raises: ValueError: the ranks differ.
    Source: PEFT's LoraModel.add_weighted_adapter, combination_type="linear".

    >>> A, B, *_ = linear([np.eye(2)], [np.eye(2)], [-4.0])
    >>> B @ A
    array([[-4.,  0.],
           [ 0., -4.]])
    """
    check_equal_ranks(As, "linear")
    signed, roots = roots_of(scales)
    A = sum(root * A for root, A in zip(signed, As, strict=True))
    return Factors(A, sum(root * B for root, B in zip(roots, Bs, strict=True)))


def check_equal_ranks(As: As, kind: str) -> None:
    """ValueError if the factors of the adapters do not have the same rank."""
    ranks = [A.shape[-2] for A in As]
    if len(set(ranks)) > 1:
        raise ValueError(f"combination_type={kind!r} needs equal ranks, got {ranks}; use 'cat' or 'svd'")


def roots_of(scales: Sequence[float]) -> tuple[list[float], list[float]]:
    """sign(s) sqrt|s| for A, and sqrt|s| for B: their product is s.

    >>> roots_of([-4.0, 9.0])
    ([-2.0, 3.0], [2.0, 3.0])
    """
    roots = [math.sqrt(abs(s)) for s in scales]
    return [math.copysign(root, s) for root, s in zip(roots, scales, strict=True)], roots


def svd(As: As, Bs: Bs, scales: Sequence[float], r: int) -> Factors:
    """The best rank-r approximation of sum(w_i s_i B_i A_i): B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T.

    Exact if r is at least the rank of the sum. Missing rows and columns are zero.
    Source: PEFT's LoraModel.add_weighted_adapter, combination_type="svd"; Eckart-Young for "best".

    >>> A, B, *_ = svd([np.diag([3.0, 1.0])], [np.eye(2)], [1.0], r=1)
    >>> (B @ A).round(12)
    array([[3., 0.],
           [0., 0.]])
    """
    A, B, *_ = cat(As, Bs, scales)
    return split(*numerics.svd_of_product(B, A), r)


def split(U: Array, S: Array, Vh: Array, r: int) -> Factors:
    """B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T. Missing rows and columns are zero."""
    root = S[..., :r] ** 0.5
    A, B = root[..., :, None] * Vh[..., :r, :], U[..., :, :r] * root[..., None, :]
    missing = r - Vh.shape[-2]
    if missing > 0:
        A = _cat([A, 0 * A[..., :1, :]] + [0 * A[..., :1, :]] * (missing - 1), -2)
        B = _cat([B, 0 * B[..., :, :1]] + [0 * B[..., :, :1]] * (missing - 1), -1)
    return Factors(A, B)


COMBINATIONS: dict[str, Callable[..., Factors]] = {"linear": linear, "cat": cat, "svd": svd}


def _cat(parts: Sequence[Array], axis: int) -> Array:
    library = sys.modules["torch"] if numerics.is_torch(parts[0]) else np
    return library.concatenate(list(parts), axis=axis)
