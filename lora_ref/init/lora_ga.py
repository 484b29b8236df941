"""`init_lora_weights="lora_ga"`: factors from the gradient, so that the first step is near that of full training."""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from . import residual

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


def lora_ga(
    weight: Float[Array, "out in"],
    r: int,
    scaling: float = 1.0,
    rng: Any = None,
    *,
    gradient: Float[Array, "out in"],
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float | int = 16,
) -> Factors:
    """A = c V_a^T, B = c U_b, where U S V^T = G, the gradient at W. The sets a and b divide 1 .. 2r.

    residual = W - s B A (the paper's frozen weight). The gradients of A and B are s B^T G and s G A^T. So the first
    step changes s B A by -lr s^2 (B B^T G + G A^T A). With 2r different singular vectors in B and A this is the
    projection of G on its 2r leading triples. No matrix of rank 2r is nearer to the step of full training.

    direction: "ArB2r" a = 1 .. r, b = r+1 .. 2r; "A2rBr" the reverse; "ArBr" a = 2, 4, .., b = 1, 3, ..; "random".
    scale: "stable" c = out^(1/4) / sqrt(stable_gamma): the size of the output depends neither on r nor on the width.
        "gd_scale" c = 1 / s: the first step is that projection. "unit" c = 1. "weight_svd" c = mean(sqrt(S_r(W) / s)),
        the size of PiSSA's factors.
    Raises: ValueError: 2r > min(in, out), scaling <= 0, a gradient that is zero or not finite or has another shape than
    the weight, an unknown direction or scale, stable_gamma <= 0, or the dtype cannot hold the factors.
    Source: LoRA-GA, arXiv 2407.05000, section 3.2 and 3.3 and algorithm 1; the authors' code for the other options.
    Differs from PEFT: there B is multiplied by the singular values of G, and only B by c. "random" gives A and B the
    same directions. A Conv1D has `in` in place of `out`. The SVD is not exact.

    >>> import numpy as np
    >>> A, B, residual, _ = lora_ga(np.eye(2), r=1, gradient=np.diag([5.0, 1.0]), scale="unit")
    >>> A, B.T, residual  # A is the first direction, B the second
    (array([[1., 0.]]), array([[0., 1.]]), array([[ 1.,  0.],
           [-1.,  1.]]))
    """
    check_lora_ga(weight.shape, r, scaling, direction, scale, stable_gamma)
    if tuple(gradient.shape) != tuple(weight.shape):
        raise ValueError(f"the gradient is {tuple(gradient.shape)}, the weight {tuple(weight.shape)}")
    return scale_directions(weight, *gradient_directions(gradient, r, direction, rng), scaling, scale, stable_gamma)


def check_lora_ga(
    shape: tuple[int, ...],
    r: int,
    scaling: float = 1.0,
    direction: str = "ArB2r",
    scale: str = "stable",
    stable_gamma: float | int = 16,
) -> None:
    """Raise ValueError unless 2r <= min(in, out), scaling > 0 and the options are valid.

    >>> check_lora_ga((4, 8), r=3)
    Traceback (most recent call last):
    ...
    ValueError: init_lora_weights='lora_ga' takes r directions for A and r for B: 2r <= min(in, out) = 4, r=3 is more
    """
    residual.check_shape("lora_ga", shape, r, scaling)
    if 2 * r > min(shape):
        need = f"2r <= min(in, out) = {min(shape)}, r={r} is more"
        raise ValueError(f"init_lora_weights='lora_ga' takes r directions for A and r for B: {need}")
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r}: must be one of {', '.join(map(repr, DIRECTIONS))}")
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r}: must be one of {', '.join(map(repr, SCALES))}")
    if not stable_gamma > 0:
        raise ValueError(f"stable_gamma={stable_gamma}: must be > 0")


def gradient_directions(
    gradient: Float[Array, "out in"], r: int, direction: str = "ArB2r", rng: Any = None
) -> tuple[Float[Array, "r in"], Float[Array, "out r"]]:
    """V_a^T and U_b of the gradient's 2r leading triples; ValueError if the gradient is zero or not finite.

    >>> import numpy as np
    >>> A, B = gradient_directions(np.diag([4.0, 3.0, 2.0, 1.0]), r=2, direction="ArBr")
    >>> abs(A).argmax(1), abs(B).argmax(0)
    (array([1, 3]), array([0, 2]))
    """
    largest = float(abs(gradient).max())
    if not 0 < largest < float("inf"):
        raise ValueError("the gradient is zero, or not finite: it has no direction")
    U, _, Vh = numerics.leading_svd(numerics.at_least_float32(gradient) / largest, 2 * r)
    order = list(range(2 * r))
    if direction == "random":  # sorting 2r draws gives a random permutation
        order = [int(i) for i in numerics.draw_normal((2 * r,), 1.0, U, rng).argsort()]
    a, b = (order[1::2], order[0::2]) if direction == "ArBr" else (order[:r], order[r:])
    if direction == "A2rBr":
        a, b = b, a
    return Vh[a], U[:, b]


def scale_directions(
    weight: Float[Array, "out in"],
    A: Float[Array, "r in"],
    B: Float[Array, "out r"],
    scaling: float,
    scale: str = "stable",
    stable_gamma: float | int = 16,
) -> Factors:
    """Factors c A and c B, residual = W - s * (c B) (c A), with the c of `scale`.

    >>> import numpy as np
    >>> A, B, *_ = scale_directions(np.zeros((16, 2)), np.eye(1, 2), np.eye(16, 1), scaling=0.5, stable_gamma=4)
    >>> A, B[0]  # 16^(1/4) / sqrt(4) = 1
    (array([[1., 0.]]), array([1.]))
    """
    check_lora_ga(weight.shape, len(A), scaling, scale=scale, stable_gamma=stable_gamma)
    W, r = numerics.at_least_float32(weight), len(A)
    c: Any = 1.0
    if scale == "stable":
        c = weight.shape[0] ** 0.25 / stable_gamma**0.5
    elif scale == "gd_scale":
        c = 1 / scaling
    elif scale == "weight_svd":
        c = (numerics.leading_svd(W, r)[1] ** 0.5).mean() / scaling**0.5
    return residual.factors_with_residual(weight, c * numerics.cast(A, W), c * numerics.cast(B, W), scaling)
