"""TIES, DARE and magnitude pruning: sums of tensors of which only a part is kept.

    magnitude_prune   sum_i w_i trim(x_i)
    dare_linear       sum_i w_i drop(x_i)
    ties, dare_ties   the mean of those w_i x_i whose sign is that of the majority, entry by entry

trim keeps the largest entries. drop keeps random ones, and divides them by their share. Pure functions on NumPy arrays
and torch tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .. import numerics
from ..core.update import Array, Factors, delta
from ..numerics.arrays import library
from .combination import check_equal_ranks, roots_of, split


def trim(x: Array, density: float) -> Array:
    """x with all entries 0 but the int(density * size) largest in magnitude.

    Source: TIES, arXiv 2306.01708, section 4.1, step 1.

    >>> trim(np.array([[1.0, -4.0], [3.0, 2.0]]), 0.5)
    array([[ 0., -4.],
           [ 3.,  0.]])
    """
    if density >= 1:
        return x
    flat, k = abs(x).reshape(-1), int(density * x.size if isinstance(x, np.ndarray) else density * x.numel())
    if numerics.is_torch(x):
        mask: Any = flat.new_zeros(flat.shape).scatter_(0, flat.topk(k).indices, 1.0)
    else:
        mask = np.zeros(flat.shape, x.dtype)
        mask[np.argsort(-flat, kind="stable")[:k]] = 1
    return x * mask.reshape(x.shape)


def drop(x: Array, density: float, rng: Any = None) -> Array:
    """x / density where a coin with P(1) = density shows 1, else 0: its expectation is x.

    The coins are torch's global generator's for a tensor, and those of `rng` for an array.
    Source: DARE, arXiv 2311.03099, section 3.2.

    >>> drop(np.ones(8), 0.5, np.random.default_rng(0)).tolist()
    [0.0, 2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    """
    if density >= 1:
        return x
    if numerics.is_torch(x):
        mask: Any = library(x).bernoulli(0 * x + density)
    else:
        mask = (np.random.default_rng(rng).random(x.shape) < density).astype(x.dtype)
    return x * mask / density


def elect(parts: Sequence[Array], method: str) -> list[Array]:
    """For each part a mask: 1 where its sign is that of the majority, "total" of the sum or "frequency" of the signs.

    Source: TIES, arXiv 2306.01708, section 4.1, step 2.

    >>> elect([np.array([1.0, -1.0]), np.array([-3.0, -1.0]), np.array([1.0, 1.0])], "total")
    [array([0., 1.]), array([1., 1.]), array([0., 0.])]
    """
    xp = library(parts[0])
    signs = [xp.sign(x) for x in parts]
    total = sum(signs if method == "frequency" else parts)
    majority = 2.0 * (total >= 0) - 1.0
    return [1.0 * (sign == majority) for sign in signs]


def merged(
    parts: Sequence[Array], weights: Sequence[float], kind: str, density: float, majority_sign_method: str
) -> Array:
    """The weighted sum of what `kind` keeps; for the kinds with ties, the mean of those whose sign is elected."""
    keep, elects = KINDS[kind]
    kept = [keep(x, density) for x in parts] if keep else list(parts)
    scaled = [w * x for w, x in zip(weights, kept, strict=True)]
    if not elects:
        return sum(scaled)
    masks = elect(kept, majority_sign_method)
    count = sum(masks)
    return sum(x * mask for x, mask in zip(scaled, masks, strict=True)) / (count + (count == 0))


# {combination_type: (what is kept, are signs elected?)}; each also with "_svd"
KINDS: dict[str, tuple[Callable[..., Array] | None, bool]] = {
    "magnitude_prune": (trim, False),
    "ties": (trim, True),
    "dare_linear": (drop, False),
    "dare_ties": (drop, True),
}


def of_factors(As: Sequence[Array], Bs: Sequence[Array], scales: Sequence[float], kind: str, **options: Any) -> Factors:
    """A and B of several adapters, each merged on its own, as "linear" adds them: not the merged updates.

    Raises: ValueError: the ranks differ.
    Source: PEFT's LoraModel.add_weighted_adapter.
    """
    check_equal_ranks(As, kind)
    signed, roots = roots_of(scales)
    return Factors(merged(As, signed, kind, **options), merged(Bs, roots, kind, **options))


def of_updates(
    As: Sequence[Array],
    Bs: Sequence[Array],
    scalings: Sequence[float],
    weights: Sequence[float],
    kind: str,
    r: int,
    **options: Any,
) -> Factors:
    """The best factors of rank r of the merged updates s_i B_i A_i.

    Source: PEFT's LoraModel.add_weighted_adapter, the kinds that end in "_svd".
    """
    updates = [delta(A, B, s) for A, B, s in zip(As, Bs, scalings, strict=True)]
    return split(*numerics.svd(merged(updates, weights, kind, **options)), r)
