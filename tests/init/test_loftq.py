"""LoftQ: what its alternation promises, against the same steps written out in float64."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_ref.core.update import Factors
from lora_ref.init.decompositions import loftq
from lora_ref.numerics.quantization import codebook, dequantize, quantize
from spec_tests import close
from spec_tests.rounding import unit

bits_ = st.sampled_from([2, 4, 8])
seeds = st.integers(0, 2**32 - 1)
scalings = st.floats(2.0**-6, 2.0**6)
turns = st.integers(1, 5)


@st.composite
def weights(draw):
    """Gaussian, with a decaying spectrum, of deficient rank, of a few large entries; 1xN, tall, wide, square."""
    n_out, n_in = draw(st.integers(1, 12)), draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(seeds))
    W = rng.standard_normal((n_out, n_in))
    kind = draw(st.sampled_from(["gaussian", "decaying", "deficient", "outliers"]))
    if kind == "decaying":
        W *= np.exp(-np.arange(n_in) / 4)
    if kind == "deficient":
        W = rng.standard_normal((n_out, 2)) @ rng.standard_normal((2, n_in))
    return W**5 if kind == "outliers" else W


weight_and_rank = weights().flatmap(lambda W: st.tuples(st.just(W), st.integers(1, min(W.shape))))


def rounded(W: np.ndarray, bits: int) -> np.ndarray:
    """Quantised and back, by a table of all distances."""
    flat = np.append(W.reshape(-1), np.zeros(-W.size % 64)).reshape(-1, 64)
    scale = abs(flat).max(1, keepdims=True)
    x = flat / np.where(scale > 0, scale, 1)
    nearest = codebook(bits)[abs(x[..., None] - codebook(bits)).argmin(-1)]
    return (nearest * scale).reshape(-1)[: W.size].reshape(W.shape)


def written_out(W: np.ndarray, r: int, bits: int, iterations: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Q, D and the smallest relative gap below the r-th singular value: its part of W - Q turns by rounding / gap."""
    D, gap = np.zeros_like(W), 1.0
    for _ in range(iterations):
        Q = rounded(W - D, bits)
        U, S, Vh = np.linalg.svd(W - Q)
        D = U[:, :r] * S[:r] @ Vh[:r]
        gap = min(gap, (S[r - 1] - np.append(S, 0)[r]) / S[0]) if S[0] else 0.0
    return Q, D, gap


def rounding(W, *parts, u=2.0**-53):
    """Of two decompositions of the size of W, and of the factors that come of them.

    Each decomposition of m by n numbers is off by 8 m n roundings (Higham, Accuracy and Stability, 19.4, with 8 for his
    constant c). The factors go through two roots, a quotient, a product and a sum of min(m, n) products.
    """
    return 2 * (8 * W.size + 10 + min(W.shape)) * u * sum(map(np.linalg.norm, (W, *parts)))


@given(weight_and_rank, scalings, bits_, turns)
def test_it_is_the_alternation_written_out(weight_and_rank, s, bits, iterations):
    W, r = weight_and_rank
    Q, D, gap = written_out(W, r, bits, iterations)
    assume(8192 * gap > 1)  # else the bound allows anything
    for weight in (W, torch.from_numpy(W)):
        A, B, residual, exact = loftq(weight, r, s, bits=bits, iterations=iterations)
        assert not exact
        assert (A.shape, B.shape, residual.shape) == ((r, W.shape[1]), (W.shape[0], r), W.shape)
        # a singular subspace moves by rounding / gap, in every turn by what those before it moved
        bound = rounding(W, W - Q) * (1 + 2 * iterations / gap)
        assert abs(np.asarray(residual) - Q).max() <= bound
        assert abs(s * np.asarray(B @ A) - D).max() <= bound


@given(weight_and_rank, scalings, bits_, turns)
def test_the_factors_are_the_best_of_their_rank_and_balanced(weight_and_rank, s, bits, iterations):
    W, r = weight_and_rank
    A, B, Q, _ = loftq(W, r, s, bits=bits, iterations=iterations)
    S = np.linalg.svd(W - Q, compute_uv=False)
    bound = rounding(W, W - Q)
    assert abs(np.linalg.norm(W - Q - s * B @ A) - np.linalg.norm(S[r:])) <= bound  # Eckart and Young
    assert abs(A @ A.T - np.diag(S[:r] / s)).max() <= bound / s
    assert abs(B.T @ B - np.diag(S[:r] / s)).max() <= bound / s


@given(weight_and_rank, scalings, bits_, turns)
def test_the_adapted_weight_does_not_depend_on_alpha(weight_and_rank, s, bits, iterations):
    W, r = weight_and_rank
    one, other = (loftq(W, r, scaling, bits=bits, iterations=iterations) for scaling in (1.0, s))
    assert np.array_equal(one.residual, other.residual)
    size = np.linalg.norm(one.A) * np.linalg.norm(one.B)
    # each factor has two roots, a quotient and a product; then r products, the scaling and the difference
    close(one.B @ one.A, s * other.B @ other.A, terms=8 + r + 2, size=size)


@given(weight_and_rank, scalings, bits_)
def test_one_turn_improves_on_plain_quantisation_whatever_the_weight(weight_and_rank, s, bits):
    W, r = weight_and_rank
    A, B, Q, _ = loftq(W, r, s, bits=bits)
    plain = dequantize(quantize(W, bits))
    assert np.array_equal(Q, plain)
    S = np.linalg.svd(W - plain, compute_uv=False)
    # the largest singular value, at least, is made up for
    assert np.linalg.norm(W - Q - s * B @ A) <= np.linalg.norm(S[1:]) + rounding(W, W - Q)


@pytest.mark.parametrize("s", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("r", [1, 4, 32])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_more_turns_improve_on_plain_quantisation_too(decay, r, bits, iterations, s):
    """Not a law: a 14x4 weight at 2 bits can be worse after five turns (1 of 17,000 random ones, by 0.2 %)."""
    W = np.random.default_rng(0).standard_normal((48, 64)) * np.exp(-decay * np.arange(64))
    A, B, Q, _ = loftq(W, r, s, bits=bits, iterations=iterations)
    assert np.linalg.norm(W - Q - s * B @ A) < np.linalg.norm(W - dequantize(quantize(W, bits)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@given(weight_and_rank=weight_and_rank, s=scalings, bits=bits_, iterations=turns)
def test_in_every_precision_the_factors_make_up_for_the_base_as_stored(dtype, weight_and_rank, s, bits, iterations):
    W, r = torch.from_numpy(weight_and_rank[0]).to(dtype), weight_and_rank[1]
    A, B, Q, _ = loftq(W, r, s, bits=bits, iterations=iterations)
    assert A.dtype is B.dtype is Q.dtype is dtype
    A, B, missing = A.double(), B.double(), W.double() - Q.double()
    S = torch.linalg.svdvals(missing)
    # rounding the factors, 3 u S_k for each triple, and computing them in at least float32;
    # what underflows in float16 is lost in each entry of a factor and multiplied by the other
    u, computing = unit(dtype), min(unit(dtype), 2.0**-24)
    lost = s * 2.0**-25 * W.shape[0] ** 0.5 * W.shape[1] ** 0.5 * r * float(1 + (S[0] / s) ** 0.5)
    bound = 3 * u * S[:r].sum() + lost * (dtype is torch.float16)
    bound += rounding(W.double().numpy(), missing.numpy(), u=computing)
    assert (missing - s * B @ A).norm() <= S[r:].norm() + bound


@given(weights(), scalings, bits_, turns)
def test_with_full_rank_nothing_is_left_over(W, s, bits, iterations):
    A, B, Q, _ = loftq(W, min(W.shape), s, bits=bits, iterations=iterations)
    assert np.linalg.norm(W - Q - s * B @ A) <= rounding(W, W - Q)


@pytest.mark.parametrize("s", [1.0, 4.0, 1 / 9])
def test_by_hand(s):
    # NF2 is -1, 0, c, 1 and the block's scale 2: W - Q has 0.5 - 2 c ~ -0.18 and 0.3 on its diagonal
    W, c = np.array([[0.5, -2.0], [2.0, 0.3]]), codebook(2)[2]
    A, B, Q, _ = loftq(W, 1, s, bits=2)
    assert Q.tolist() == [[2 * c, -2], [2, 0]]
    # a decomposition of 2 by 2 numbers; a rounding turns its directions by 1 / gap
    root, terms = (0.3 / s) ** 0.5, 8 * 4 * (1 + 2 * 0.3 / (0.3 - 0.18))
    close(A, [[0.0, root]], terms, size=root)
    close(B, [[0.0], [root]], terms, size=root)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("iterations", [1, 3])
def test_a_weight_of_zeros(iterations, dtype):
    A, B, Q, _ = loftq(torch.zeros(3, 5, dtype=dtype), 2, iterations=iterations)
    for x in (A, B, Q):
        assert not x.any()


def test_the_same_every_time_and_for_every_generator():
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    one, other = (loftq(W, 4, 2.0, rng, iterations=3) for rng in (None, torch.Generator().manual_seed(5)))
    for x, y in zip(one[:3], other[:3], strict=True):
        assert torch.equal(x, y)


def test_the_weight_is_left_alone():
    W = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    before = W.clone()
    loftq(W, 4, 2.0, iterations=3)
    assert torch.equal(W, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_large_weight_takes_the_same_way(dtype):
    """Large enough for the iterative decomposition."""
    W = torch.randn(300, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    A, B, Q, _ = loftq(W, 4, 2.0, bits=4, iterations=1)
    missing = W.double() - Q.double()
    S = torch.linalg.svdvals(missing)
    error = (missing - 2.0 * B.double() @ A.double()).norm()
    # `leading_svd` asserts that each of four defects of a triple is at most 64 spacings of float32, 2^-23
    assert abs(error - S[4:].norm()) <= 3 * unit(dtype) * S[:4].sum() + 4 * 64 * 2.0**-23 * S[0] * 4**0.5
    assert torch.equal(Q, dequantize(quantize(W, 4)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"r": 4}, r"r <= min\(in, out\) = 3, r=4"),
        ({"scaling": 0.0}, "lora_alpha must be > 0"),
        ({"scaling": -1.0}, "lora_alpha must be > 0"),
        ({"bits": 3}, "bits=3: must be 2, 4 or 8"),
        ({"iterations": 0}, "iterations=0: must be at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        loftq(np.ones((3, 5)), **({"r": 2} | options))


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        loftq(np.array([[1.0, np.nan], [0.0, 1.0]]), 1)


def test_only_a_quantised_start_says_that_it_is_not_exact() -> None:
    W = np.random.default_rng(0).standard_normal((4, 4))
    assert Factors(W, W).exact
    assert not loftq(W, 1, 1.0, bits=4).exact
