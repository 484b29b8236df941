"""The update s B A of a frozen weight: a product of two thin factors.

    y = W x + s B (A x)        W (out, in) frozen, A (r, in), B (out, r) trained

Every function takes NumPy arrays or torch tensors, and batches of them: `@` carries leading dimensions along (experts
of a mixture, groups of a convolution).
"""

import sys
from typing import Any, NamedTuple

from jaxtyping import Float

Array = Any  # a numpy.ndarray or a torch.Tensor
Weight = Float[Array, "*batch out in"]


class Factors(NamedTuple):
    """The result of an init: the factors, and the frozen weight of its paper.

    `residual` is None where the update is added to W itself. Else the adapted weight at the start is residual + s B A.
    Where `exact`, that is W but for rounding. LoftQ's is only as near to W as rank r allows.
    """

    A: Float[Array, "*batch r in"]
    B: Float[Array, "*batch out r"]
    residual: Weight | None = None
    exact: bool = True


def delta(A: Float[Array, "*batch r in"], B: Float[Array, "*batch out r"], scaling: float) -> Weight:
    """D = s B A, the update of the logical weight (out, in). Its rank is at most r: the assumption of LoRA.

    Source: LoRA, arXiv 2106.09685, equation 3.

    >>> import numpy as np
    >>> A, B = np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]])  # r = 1
    >>> delta(A, B, scaling=2.0)
    array([[ 6., 12.],
           [ 8., 16.]])
    """
    return scaling * (B @ A)  # (out, r) @ (r, in) -> (out, in)


def is_torch(x: Array) -> bool:
    """True for a torch tensor, False for a NumPy array."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def at_least_float32(x: Array) -> Array:
    """x itself, or x cast to float32 from a half precision."""
    if x.dtype.itemsize >= 4:
        return x
    return x.float() if is_torch(x) else x.astype("float32")


def pack_experts(
    A: Float[Array, "experts r in"], B: Float[Array, "experts out r"]
) -> tuple[Float[Array, "packed in"], Float[Array, "out packed"]]:
    """The adapter file's layout of E experts: A (r*E, in) expert by expert, B (out, r*E) rank by rank.

    Note the asymmetry: row e*r + k of A belongs to expert e, but in B it is column k*E + e.

    >>> import numpy as np
    >>> A, B = pack_experts(np.arange(4.0).reshape(2, 2, 1), np.arange(4.0).reshape(2, 1, 2))
    >>> A.T, B
    (array([[0., 1., 2., 3.]]), array([[0., 2., 1., 3.]]))
    """
    n_experts, r, n_in = A.shape
    B = B.swapaxes(0, 1).swapaxes(1, 2)  # (E, out, r) -> (out, r, E)
    return A.reshape(n_experts * r, n_in), B.reshape(len(B), r * n_experts)


def unpack_experts(
    A: Float[Array, "packed in"], B: Float[Array, "out packed"], n_experts: int
) -> tuple[Float[Array, "experts r in"], Float[Array, "experts out r"]]:
    """The inverse of `pack_experts`: A (E, r, in), B (E, out, r)."""
    B = B.reshape(len(B), -1, n_experts).swapaxes(1, 2).swapaxes(0, 1)  # (out, r, E) -> (E, out, r)
    return A.reshape(n_experts, -1, A.shape[-1]), B
