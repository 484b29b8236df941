"""CorDA: the formula, and what it does not depend on."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.corda import collect_eigens_for_layer
from torch import nn

from lora_ref.init import corda as method
from lora_ref.init.corda import call_covariance, corda, damp, output_directions
from spec_tests import close
from spec_tests.rounding import unit

SHAPES = [(1, 5), (5, 1), (4, 4), (3, 7), (8, 3), (12, 16)]


def weight_of(kind: str, n_out: int, n_in: int, rng: np.random.Generator) -> np.ndarray:
    """A weight of unit size with this spectrum."""
    m = min(n_out, n_in)
    S = {
        "decaying": 2.0 ** -np.arange(m),
        "flat": np.ones(m),
        "rank one": np.eye(m)[0],
        "zero": np.zeros(m),
    }[kind]
    U, V = (np.linalg.qr(rng.normal(size=(n, m)))[0] for n in (n_out, n_in))
    return U * S @ V.T


def inputs_of(kind: str, n_in: int, rng: np.random.Generator) -> np.ndarray:
    """Inputs (tokens, in): more tokens than entries, fewer, or nearly all of the energy in one direction."""
    x = rng.normal(size=(2 if kind == "few" else 3 * n_in, n_in))
    return x + 30 * rng.normal(size=n_in) if kind == "outlier" else x


@st.composite
def problems(draw):
    """(W, C', r, method, rng), all in float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_out, n_in = draw(st.sampled_from(SHAPES))
    W = weight_of(draw(st.sampled_from(["decaying", "flat", "rank one", "zero"])), n_out, n_in, rng)
    C = call_covariance(inputs_of(draw(st.sampled_from(["many", "few", "outlier"])), n_in, rng))
    return W, C, draw(st.integers(1, min(n_out, n_in))), draw(st.sampled_from(["ipm", "kpm"]))


scalings = st.floats(0.01, 100.0)
libraries = st.sampled_from([np.asarray, torch.from_numpy])


@given(problems(), scalings, libraries)
def test_the_update_is_the_formula_with_the_inverse(problem, s, library):
    W, C, r, mode = problem
    A, B, R, exact = corda(library(W), r, s, covariance=library(C), corda_method=mode)
    A, B, R = (np.asarray(x) for x in (A, B, R))
    assert A.shape == (r, W.shape[1]) and B.shape == (W.shape[0], r) and R.shape == W.shape and exact
    D = C + 0.01 * np.trace(C) / len(C) * np.eye(len(C))
    G, u, n = W @ D, 2.0**-53, sum(W.shape)
    U, S = (np.asarray(x) for x in output_directions(library(W), library(D), r, mode))
    size, condition = np.linalg.norm(W), np.linalg.cond(D)
    # U_r S_r V_r^T C'^-1, with the inverse that the code does without; U_r^T G = S_r V_r^T
    with_inverse = U @ (U.T @ G) @ np.linalg.inv(D)
    assert abs(s * B @ A - with_inverse).max() <= 8 * n * u * condition * size
    # U_r is orthonormal and holds as much (or as little) of W C' as any r directions can: Ky Fan
    assert abs(U.T @ U - np.eye(r)).max() <= 8 * n * u
    every = np.linalg.svd(G)[1]
    best = every[:r] if mode == "ipm" else every[len(every) - r :]
    assert abs((S**2).sum() - (best**2).sum()) <= 8 * n * u * every[0] ** 2
    assert abs(np.sort(S)[::-1] - best).max() <= 8 * n * u * every[0]
    # columns of B: orthogonal, |B_k|^2 = S_k / s
    assert abs(B.T @ B - np.diag(S) / s).max() <= 8 * n * u * max(S.max(), 1e-300) / s
    # nothing is lost, and the sign is the rule's
    assert (abs(R + s * B @ A - W) <= 4 * (r + 2) * u * (abs(W) + s * abs(B) @ abs(A))).all()
    assert all(row[abs(row).argmax()] >= 0 for row in A)


@given(problems(), scalings)
def test_the_update_does_not_depend_on_alpha_nor_on_the_size_of_the_covariance(problem, s):
    W, C, r, mode = problem
    A, B, R, _ = corda(W, r, s, covariance=C, corda_method=mode)
    A1, B1, R1, _ = corda(W, r, 1.0, covariance=4 * C, corda_method=mode)  # 4: no rounding
    bound = 8 * (r + 4) * 2.0**-53 * (abs(W) + s * abs(B) @ abs(A))
    assert (abs(s * B @ A - B1 @ A1) <= bound).all()
    assert (abs(R - R1) <= bound).all()


def test_by_hand():
    # W C' = diag(3 (1 + d), 2 (9 + d)) with d = .01 * 5: the second output comes first
    A, B, R, _ = corda(np.diag([3.0, 2.0]), 1, 0.5, covariance=np.diag([1.0, 9.0]))
    S = 2 * 9.05
    b, a = math.sqrt(S / 0.5), 2 / math.sqrt(S * 0.5)
    # d: 4; W C': 2; vectors of a 2x2 matrix over a gap of 1 - 3.15 / 18.1: 5; a norm, two roots, a product: 5
    close(B, np.array([[0], [b]]), terms=16, size=b)
    close(A, np.array([[0, a]]), terms=16, size=a)
    close(R, np.array([[3.0, 0], [0, 0]]), terms=34, size=4)  # both of them, s, and the difference
    A, B, R, _ = corda(np.diag([3.0, 2.0]), 1, 0.5, covariance=np.diag([1.0, 9.0]), corda_method="kpm")
    close(R, np.array([[0, 0], [0, 2.0]]), terms=34, size=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.sampled_from([0.25, 1.0, 3.0]))
def test_lower_precisions_follow_float64(dtype, mode, seed, shape, s):
    rng, r = np.random.default_rng(seed), max(1, min(shape) // 2)
    C = call_covariance(inputs_of("many", shape[1], rng))
    D = damp(C)
    # singular values of W C': 1, 1/2, 1/4, ...
    W = torch.from_numpy(weight_of("decaying", *shape, rng) @ np.linalg.inv(D)).to(dtype)
    W64 = W.double().numpy()
    A, B, R, _ = corda(W, r, s, covariance=torch.from_numpy(C), corda_method=mode)
    assert A.dtype == B.dtype == R.dtype == dtype
    u, half = unit(torch.float32), unit(dtype)
    update = s * B.double() @ A.double()
    # whatever the rounding of the factors: base and update give W, to the rounding of the base
    bound = half * (R.double().abs() + W.double().abs()) + 4 * (r + 2) * u * (
        W.double().abs() + s * B.double().abs() @ A.double().abs()
    )
    if dtype is torch.float16:
        bound += 2.0**-24  # its smallest number
    assert ((R.double() + update - W.double()).abs() <= bound).all()
    # the update: U_r turns by (rounding of W C') / gap, then A and B are rounded
    A64, B64, *_ = corda(W64, r, s, covariance=C, corda_method=mode)
    every = np.append(np.linalg.svd(W64 @ D)[1], 0.0)
    split = r if mode == "ipm" else min(shape) - r
    if 0 < split < min(shape):
        turn = sum(shape) * u * np.linalg.norm(W64) * np.linalg.norm(D) / (every[split - 1] - every[split])
        bound = 4 * turn * np.linalg.norm(W64) + 4 * half * (s * abs(B64) @ abs(A64)).max() + 2.0**-20
        assert abs(update.numpy() - s * B64 @ A64).max() <= bound


def test_a_covariance_that_says_nothing_and_options_out_of_range_are_errors():
    W, C = np.eye(3, 4), np.eye(4)
    for bad in (0 * C, C + np.nan, C + np.inf):
        with pytest.raises(ValueError, match="zero, or not finite"):
            corda(W, 1, covariance=bad)
    with pytest.raises(ValueError, match=r"r <= min\(in, out\) = 3, r=4"):
        corda(W, 4, covariance=C)
    with pytest.raises(ValueError, match="lora_alpha must be > 0"):
        corda(W, 1, 0.0, covariance=C)
    with pytest.raises(ValueError, match="'ipm' or 'kpm'"):
        corda(W, 1, covariance=C, corda_method="imp")


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([(), (1,), (3,), (2, 3)]), libraries)
def test_a_call_adds_the_second_moment_of_its_normalised_tokens(seed, negative, batch, library):
    x = np.random.default_rng(seed).normal(size=(*batch, 4))
    x = -abs(x) if negative else x
    rows = x.reshape(-1, 4) / abs(x).max()
    want = sum(np.outer(row, row) for row in rows)
    assert abs(np.asarray(call_covariance(library(x))) - want).max() <= 8 * len(rows) * 2.0**-53 * len(rows)
    assert not np.asarray(call_covariance(library(0 * x))).any()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["many", "few", "outlier"]), st.integers(1, 40), libraries)
def test_the_damping_is_one_hundredth_of_the_mean_variance_in_float64(seed, kind, n, library):
    C = call_covariance(inputs_of(kind, n, np.random.default_rng(seed)))
    want = C + 0.01 * np.trace(C) / n * np.eye(n)
    close(damp(library(C)), want, terms=n + 3, size=want)  # the trace, divided, times 0.01, added


def dampings(C: torch.Tensor, probe: torch.Tensor) -> tuple[float, float]:
    """The damping that this library takes and the one that PEFT takes, for a probe with |probe C| = 0, |probe| = 1.

    With the weight `probe` (1, in), W C' is d * mean(diag C) * probe, whose singular value shows d.
    """
    layer = nn.Linear(len(C), 1, bias=False)
    layer.weight.data, layer.covariance_matrix = probe[None].clone(), C.clone()
    mean = C.diagonal().mean().item()
    ours = (probe @ (damp(C) @ probe)).item() / mean
    return ours, collect_eigens_for_layer(layer, None).S_WC.item() / mean


# the first damping at which float32's rounding lets the inverse pass: at 2200 that differs from processor to processor
@pytest.mark.parametrize(("n", "want"), [(8, [0.01]), (300, [0.01]), (2200, [0.02, 0.04])])
def test_the_damping_is_peft_s_where_float32_cannot_invert_the_covariance(n, want):
    v = torch.randn(n, generator=torch.Generator().manual_seed(n))
    probe = torch.zeros(n)
    probe[0], probe[1] = v[1], -v[0]
    ours, pefts = dampings(torch.outer(v, v), probe / probe.norm())
    assert any(ours == pytest.approx(x, rel=0.05) for x in want)  # neighbours are a factor of 2 apart
    assert pefts == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize("kind", ["rank one", "few", "decaying", "outlier"])
def test_what_the_damping_takes_for_granted_of_float32(kind):
    """The error of the inverse stays below 10 u ||C'||_F ||C'^-1||_2 and is halved when the damping doubles."""
    g, n = torch.Generator().manual_seed(0), 400
    x = {
        "rank one": lambda: torch.randn(1, n, generator=g),
        "few": lambda: torch.randn(8, n, generator=g),
        "decaying": lambda: torch.randn(n, n, generator=g) / torch.arange(1, n + 1) @ torch.randn(n, n, generator=g),
        "outlier": lambda: torch.randn(n, n, generator=g) + 30 * torch.randn(n, generator=g),
    }[kind]()
    C, errors = call_covariance(x), []
    for damping in (0.01, 0.02, 0.04):
        D = C + damping * C.diagonal().mean() * torch.eye(n)
        errors.append(torch.dist(D @ torch.linalg.inv(D), torch.eye(n)).item())
        assert errors[-1] < 10 * 2.0**-24 * D.norm() / (damping * C.diagonal().mean())
    for worse, better in itertools.pairwise(errors):
        assert 1.5 < worse / better < 2.7


def test_ipm_beats_kpm_at_what_it_is_for():
    """The update that "ipm" takes out moves the outputs on the data most, that of "kpm" least."""
    torch.manual_seed(0)
    W, x = torch.randn(20, 30, dtype=torch.float64), torch.randn(200, 30, dtype=torch.float64) * torch.arange(1, 31)
    moved = {}
    for mode in ("ipm", "kpm"):
        A, B, *_ = method.corda(W, 4, covariance=call_covariance(x), corda_method=mode)
        moved[mode] = torch.linalg.norm(x @ (B @ A).T) / torch.linalg.norm(x @ W.T)
    assert moved["kpm"] < 0.5 * (4 / 20) ** 0.5 < (4 / 20) ** 0.5 < moved["ipm"]
