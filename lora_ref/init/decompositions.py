"""Decompositions of the weight (pissa, olora, mica), its quantisation error (loftq) or random numbers (orthogonal)."""

from typing import Any

from jaxtyping import Float

from .. import numerics
from ..core.update import Array, Factors
from ..numerics import quantization
from .residual import cast_factors, check_shape, factors_with_residual


def pissa(
    weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None, niter: int | None = None
) -> Factors:
    """B = U_r sqrt(S_r / s), A = sqrt(S_r / s) Vh_r, W = U S Vh. residual = W - s B A (the paper's frozen weight).

    For every s the update s B A is the best rank-r approximation of W (Eckart-Young). The residual has the other
    singular values: B^T residual = 0, residual A^T = 0. Row k of A and column k of B have the norm sqrt(S_k / s).
    niter=None: exact, by `numerics.leading_svd`. niter=n: the randomised SVD with n subspace iterations. It draws
    from `rng`, or from a fixed seed. W = residual + s B A holds for it too.
    Raises: ValueError: r > min(in, out), scaling <= 0, W is not finite, or the dtype cannot hold the factors.
    Source: PiSSA, arXiv 2404.02948, equations 2 to 4.
    Differs from PEFT: float64 is accepted. In half precision the residual belongs to the rounded factors. niter draws
    more columns than r, from a fixed seed.

    >>> import numpy as np
    >>> W = np.array([[3.0, 0.0], [0.0, -5.0]])
    >>> A, B, residual, _ = pissa(W, r=1, scaling=5.0)
    >>> A, B.T, residual
    (array([[0., 1.]]), array([[-0., -1.]]), array([[3., 0.],
           [0., 0.]]))
    """
    check_shape("pissa", weight.shape, r, scaling)
    if niter is None:
        U, S, Vh = numerics.leading_svd(weight, r)
    else:
        U, S, Vh = numerics.randomized_svd(weight, r, niter, rng)
    root = S**0.5 / scaling**0.5  # S / scaling may leave the range of the dtype
    return factors_with_residual(weight, root[:, None] * Vh, U * root, scaling)


def olora(weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """B = Q[:, :r], A = R[:r], where W = Q R. residual = W - s B A (the paper's frozen weight).

    B^T B = I. A is upper trapezoidal with a diagonal >= 0. With s = 1 the first r columns of the residual are zero.
    A and B do not depend on s. The first r columns of W determine Q[:, :r], and R[:r] = Q[:, :r]^T W. So the cost is
    O(in * out * r), and only the residual has the size of W.
    Raises: ValueError: r > min(in, out), scaling <= 0, W is not finite, or the dtype cannot hold the factors.
    Source: OLoRA, arXiv 2406.01775, section 3, algorithm 1.
    Differs from PEFT: fixed signs. float64 is accepted. In half precision the residual belongs to the rounded factors.

    >>> import numpy as np
    >>> A, B, residual, _ = olora(np.array([[0.0, 2.0], [-3.0, 1.0]]), r=1)
    >>> A, B.T, residual
    (array([[ 3., -1.]]), array([[-0., -1.]]), array([[0., 2.],
           [0., 0.]]))
    """
    check_shape("olora", weight.shape, r, scaling)
    W = numerics.at_least_float32(weight)
    numerics.check_finite(W)
    B, R = numerics.qr(W[:, :r])  # (out, r), (r, r)
    A = B.T @ W  # (r, out) @ (out, in) -> (r, in)
    A[:, :r] = R  # equal but for rounding, with exact zeros below the diagonal
    return factors_with_residual(weight, A, B, scaling)


def mica(weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """B = U[:, -r:], A = 0, where W = U S Vh (thin): the left singular vectors of the r smallest singular values.

    The first update is zero. Only A is trained. B is frozen, so every update lies in the column space of B.
    For an embedding W is the logical weight, (dim, vocabulary).
    This needs the full SVD. Eigenvectors of W W^T cost less, but rounding hides the squares of small singular values.
    Raises: ValueError: r > min(in, out), or W is not finite.
    Source: MiCA, arXiv 2604.01694.
    Differs from PEFT: fixed signs. float64 is accepted.

    >>> import numpy as np
    >>> A, B, residual, _ = mica(np.array([[3.0, 0.0], [0.0, -5.0]]), r=1)
    >>> A, B.T, residual
    (array([[0., 0.]]), array([[1., 0.]]), None)
    """
    check_thin(weight.shape, r)
    U, _, _ = numerics.svd(weight)  # (out, min(in, out))
    B = numerics.cast(U[:, -r:], weight)
    return Factors(numerics.cast(numerics.zeros((r, weight.shape[1]), weight), weight), B)


def check_thin(shape: tuple[int, ...], r: int, scaling: float = 1.0) -> None:
    """Raise ValueError unless r <= min(in, out). Any scaling is right: it divides nothing."""
    check_shape("mica", shape, r)


def loftq(
    weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None, bits: int = 4, iterations: int = 1
) -> Factors:
    """Q, A and B with a small ||W - (Q + s * B @ A)||_F. Q and the factors are improved by turns:

        Q_t = dequantize(quantize(W - D_(t-1))),  D_0 = 0
        D_t = U_r S_r V_r^T, the best rank-r approximation of W - Q_t

    Then B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r^T. residual = Q (the paper's frozen weight), in W's dtype.
    Q and s * B @ A do not depend on s. `rng` is not used.
    One iteration gives QLoRA's base with the best factors for it: never worse than Q alone. More iterations are usually
    better, but one of them may raise the error: the scale of a block comes from its largest number.
    Raises: ValueError: r > min(in, out), s <= 0, bits not 2, 4 or 8, iterations < 1, W or a factor is not finite.
    Source: LoftQ, arXiv 2310.08659, algorithm 1 (there s = 1).
    Differs from PEFT: needs no bitsandbytes. PEFT computes its factors without s: at s = 2 they can be worse than none.

    >>> import numpy as np
    >>> W = np.array([[0.5, -2.0], [2.0, 0.3]])
    >>> A, B, Q, exact = loftq(W, r=1, bits=2)
    >>> Q.round(2), exact
    (array([[ 0.68, -2.  ],
           [ 2.  ,  0.  ]]), False)
    >>> (W - Q).round(2), abs(B @ A).round(2)  # the factors hold the larger singular value, 0.3
    (array([[-0.18,  0.  ],
           [ 0.  ,  0.3 ]]), array([[0. , 0. ],
           [0. , 0.3]]))
    """
    check_shape("loftq", weight.shape, r, scaling)
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: must be at least 1")
    W = numerics.at_least_float32(weight)
    X = W  # W - D_(t-1)
    for _ in range(iterations):
        # in the dtype of W, so that the factors are fitted to its rounding too
        Q = numerics.cast(quantization.dequantize(quantization.quantize(X, bits)), weight)
        U, S, Vh = numerics.leading_svd(W - Q, r)
        X = numerics.subtract_product(W, U * S, Vh, 1.0)
    root = S**0.5 / scaling**0.5
    A, B = cast_factors(weight, root[:, None] * Vh, U * root, scaling)
    return Factors(A, B, residual=Q, exact=False)


def orthogonal(weight: Float[Array, "out in"], r: int, scaling: float = 1.0, rng: Any = None) -> Factors:
    """A = (X P)^T / 10, B = Y Q / 10, where P and Q are the even and the odd rows of a random orthogonal matrix.

    P and Q are (r/2, r). X (in, r/2) and Y (out, r/2) are standard normal. Rows of an orthogonal matrix are
    orthogonal to each other: Q P^T = 0, so B A = 0. The first update is zero, and both factors get gradients
    at the first step. But A and B have rank r/2 only. Neither of them is an orthogonal matrix.
    Raises: ValueError: r is odd.
    Source: PEFT's LoraConfig, `init_lora_weights="orthogonal"` (there is no paper).

    >>> import numpy as np
    >>> A, B, *_ = orthogonal(np.zeros((6, 8)), r=4, rng=np.random.default_rng(0))
    >>> (abs(B @ A) <= 8 * 4**2 * 2**-53 * (abs(B) @ abs(A))).all()  # zero but for rounding in the QR decomposition
    np.True_
    >>> np.linalg.matrix_rank(A), np.linalg.matrix_rank(B)
    (np.int64(2), np.int64(2))
    """
    check_even(r)
    n_out, n_in = weight.shape
    rows, _ = numerics.qr(numerics.draw_normal((r, r), 1.0, weight, rng))
    X = numerics.draw_normal((n_in, r // 2), 0.1, weight, rng)
    Y = numerics.draw_normal((n_out, r // 2), 0.1, weight, rng)
    return Factors(A=(X @ rows[0::2]).T, B=Y @ rows[1::2])  # (in, r/2) @ (r/2, r) -> (in, r); likewise (out, r)


def check_even(r: int) -> None:
    """Raise ValueError unless r is even."""
    if r % 2:
        raise ValueError(f"init_lora_weights='orthogonal' needs an even rank, r={r} is odd")
