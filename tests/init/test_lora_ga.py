"""LoRA-GA: which singular directions of the gradient go where."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ref import LoraGAConfig
from lora_ref.init.lora_ga import check_lora_ga, lora_ga, scale_directions
from spec_tests import close
from spec_tests.rounding import unit

SHAPES = [(2, 5), (5, 2), (4, 4), (3, 7), (8, 6), (12, 16)]
DIRECTIONS = ["ArBr", "A2rBr", "ArB2r", "random"]
SCALES = ["stable", "weight_svd", "gd_scale", "unit"]


@st.composite
def problems(draw):
    """(W, G, r, U, V): a weight, and a gradient of singular values 1, 1/2, 1/4, ... with its vectors, in float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_out, n_in = draw(st.sampled_from(SHAPES))
    m = min(n_out, n_in)
    U, V = (np.linalg.qr(rng.normal(size=(n, m)))[0] for n in (n_out, n_in))
    G = U * 2.0 ** -np.arange(m) @ V.T
    return rng.normal(size=(n_out, n_in)), G, draw(st.integers(1, m // 2)), U, V


scalings = st.floats(0.01, 100.0)
libraries = st.sampled_from([np.asarray, torch.from_numpy])


def seeded(library, seed=0):
    return np.random.default_rng(seed) if library is np.asarray else torch.Generator().manual_seed(seed)


@given(problems(), scalings, libraries, st.sampled_from(DIRECTIONS), st.sampled_from(SCALES), st.floats(0.5, 64))
def test_factors_lie_along_singular_vectors_of_the_gradient(problem, s, library, direction, scale, gamma):
    W, G, r, U, V = problem
    factors = lora_ga(
        library(W), r, s, seeded(library), gradient=library(G), direction=direction, scale=scale, stable_gamma=gamma
    )
    A, B, R = (np.asarray(x) for x in factors[:3])
    size = {
        "stable": W.shape[0] ** 0.25 / gamma**0.5,
        "gd_scale": 1 / s,
        "unit": 1.0,
        "weight_svd": np.sqrt(np.linalg.svd(W)[1][:r] / s).mean(),
    }[scale]
    u, n = 2.0**-53, sum(W.shape)
    turn = 16 * n * u * 2.0 ** (2 * r)  # rounding of G / the smallest gap among the first 2r singular values
    along_A, along_B = abs(A @ V), abs(U.T @ B).T  # (r, m): how much of each singular vector there is in each row
    a, b = along_A.argmax(1), along_B.argmax(1)
    assert abs(along_A[range(r), a] / size - 1).max() <= turn
    assert abs(along_B[range(r), b] / size - 1).max() <= turn
    assert (A[range(r), abs(A).argmax(1)] > 0).all()  # the sign is the rule's, and B's goes with it
    want = {"ArB2r": (0, r, 1), "A2rBr": (r, 0, 1), "ArBr": (1, 0, 2)}
    if direction in want:
        first_a, first_b, step = want[direction]
        assert list(a) == list(range(first_a, first_a + r * step, step))
        assert list(b) == list(range(first_b, first_b + r * step, step))
    assert sorted([*a, *b]) == list(range(2 * r))
    assert (abs(R + s * B @ A - W) <= 4 * (r + 2) * u * (abs(W) + s * abs(B) @ abs(A))).all()


@given(problems(), scalings, libraries, st.sampled_from(DIRECTIONS))
def test_the_first_step_of_gd_scale_is_full_training_s_projected_on_2r_triples(problem, s, library, direction):
    W, G, r, U, V = problem
    A, B, *_ = lora_ga(library(W), r, s, seeded(library), gradient=library(G), direction=direction, scale="gd_scale")
    A, B = np.asarray(A), np.asarray(B)
    # the gradients of A and B are s B^T G and s G A^T
    step = s * (B @ (s * B.T @ G) + (s * G @ A.T) @ A)
    best = U[:, : 2 * r] * 2.0 ** -np.arange(2 * r) @ V[:, : 2 * r].T
    assert abs(step - best).max() <= 32 * sum(W.shape) * 2.0**-53 * 2.0 ** (2 * r)


def test_by_hand():
    # out^(1/4) / sqrt(gamma) = 2^(1/4) / 2
    A, B, R, exact = lora_ga(np.eye(2), 1, 2.0, gradient=np.diag([5.0, -1.0]), stable_gamma=4)
    c = 2**0.25 / 2
    # singular vectors of 2 + 2 roundings over a gap of 1 - 1/5, and c; two of them, s, and two sums in R
    close(A, np.array([[c, 0]]), terms=8, size=c)
    close(B, np.array([[0], [-c]]), terms=8, size=c)
    close(R, np.array([[1, 0], [2 * c * c, 1]]), terms=19, size=1 + 2 * c * c)
    assert exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(problems(), st.sampled_from([0.25, 1.0, 3.0]))
def test_lower_precisions_follow_float64(dtype, problem, s):
    W, G, r, *_ = problem
    W, G = (torch.from_numpy(x).to(dtype) for x in (W, G))
    got = lora_ga(W, r, s, gradient=G)
    want = lora_ga(W.double(), r, s, gradient=G.double())
    assert got.A.dtype == got.B.dtype == got.residual.dtype == dtype
    half, u = unit(dtype), unit(torch.float32)
    S = torch.linalg.svdvals(G.double())
    gaps = -S.diff()[: 2 * r].min() if 2 * r < len(S) else torch.minimum(-S.diff().min(), S[-1])
    turn = 16 * sum(W.shape) * u * S[0] / gaps
    for a, b in zip(got[:2], want[:2], strict=True):
        sign = torch.sign((a.double() * b).sum())  # the largest entry may be another one after rounding
        if r == 1:
            assert (sign * a.double() - b).abs().max() <= (turn + 2 * half) * b.norm()
    D, D64 = s * got.B.double() @ got.A.double(), s * want.B @ want.A
    assert (D - D64).abs().max() <= 2 * s * (turn + 2 * half) * want.B.norm() * want.A.norm() if r == 1 else True
    size = got.residual.double().abs() + W.double().abs()
    bound = half * size + 4 * (r + 2) * u * (W.double().abs() + s * got.B.double().abs() @ got.A.double().abs())
    assert ((got.residual.double() + D - W.double()).abs() <= bound + (dtype is torch.float16) * 2.0**-24).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 2}, r"2r <= min\(in, out\) = 3, r=2"),
        ({"r": 4}, r"r <= min\(in, out\) = 3, r=4"),
        ({"scaling": 0.0}, "lora_alpha must be > 0"),
        ({"direction": "BrA2r"}, "direction='BrA2r': must be one of 'ArBr'"),
        ({"scale": "gd"}, "scale='gd': must be one of 'stable'"),
        ({"stable_gamma": 0}, "stable_gamma=0: must be > 0"),
        ({"gradient": np.zeros((3, 5))}, "the gradient is zero"),
        ({"gradient": np.full((3, 5), np.nan)}, "not finite"),
        ({"gradient": np.full((3, 5), np.inf)}, "not finite"),
    ],
)
def test_what_cannot_be_done_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        lora_ga(np.ones((3, 5)), **({"r": 1, "gradient": np.ones((3, 5))} | options))


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_goes_by_its_letters(scale):
    """A string read from a file is equal to the name in the code, and another object."""
    W, G = np.eye(6, 5), np.eye(6, 5)[::-1]
    made, want = (lora_ga(W, r=1, scaling=2.0, gradient=G, scale=name) for name in ("".join(list(scale)), scale))
    assert (made.A == want.A).all() and (made.B == want.B).all()


def test_defaults_are_those_of_the_options() -> None:
    options = LoraGAConfig()
    for function in (lora_ga, check_lora_ga, scale_directions):
        for name, parameter in inspect.signature(function).parameters.items():
            if hasattr(options, name):
                assert parameter.default == getattr(options, name), (function.__name__, name)
