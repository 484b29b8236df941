"""PiSSA, OLoRA and MiCA: the invariants of their statements, on NumPy and torch, and against PEFT."""

import math

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_ref import numerics
from lora_ref.init.decompositions import mica, olora, pissa
from spec_tests import agree, close
from spec_tests.rounding import unit

SHAPES = [(1, 1), (1, 7), (7, 1), (6, 6), (20, 12), (12, 20), (300, 256), (256, 300)]
SPECTRA = ["flat", "decaying", "low rank", "repeated", "tiny gaps", "large gap", "orthogonal", "zero"]
seeds = st.integers(0, 2**32 - 1)
shapes, spectra = st.sampled_from(SHAPES), st.sampled_from(SPECTRA)
scalings = st.sampled_from([0.25, 1.0, 2.0, 16 / math.sqrt(3)])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


def matrix(seed, shape, spectrum):
    """A float64 matrix with this kind of singular values, the largest about 1."""
    rng = np.random.default_rng(seed)
    m = min(shape)
    index = np.arange(1, m + 1)
    S = {
        "flat": 1 - 0.5 * (index - 1) / m,
        "decaying": 1.0 / index,
        "low rank": np.where(index <= 2, 1.0 / index, 0.0),
        "repeated": np.where(index <= 3, 1.0, 0.5 / index),
        "tiny gaps": 1 - 2.0**-20 * index,
        "large gap": np.where(index <= 2, 1.0, 2.0**-20 / index),
        "orthogonal": np.ones(m),
        "zero": np.zeros(m),
    }[spectrum]
    U, _ = np.linalg.qr(rng.standard_normal((shape[0], m)))
    V, _ = np.linalg.qr(rng.standard_normal((shape[1], m)))
    return (U * S) @ V.T


@st.composite
def weights(draw):
    """(the weight as NumPy or torch has it, the same in float64, r, s, unit roundoff of storage and of computation)."""
    shape = draw(shapes)
    r = draw(
        st.one_of(st.just(min(shape)), st.integers(1, min(shape, default=1)), st.just(1)).filter(lambda r: r <= 64)
    )
    W = matrix(draw(seeds), shape, draw(spectra))
    dtype = draw(dtypes)
    tensor = torch.from_numpy(W).to(dtype)
    layout = draw(st.sampled_from(["C", "Fortran", "every second column"]))
    if layout == "Fortran":
        tensor = tensor.T.contiguous().T
    elif layout == "every second column":
        tensor = tensor.repeat_interleave(2, dim=1)[:, ::2]
    as_numpy = dtype in (torch.float64, torch.float32) and draw(st.booleans())
    weight = tensor.numpy() if as_numpy else tensor.detach().requires_grad_(draw(st.booleans()))
    return weight, tensor.double().numpy(), r, draw(scalings), unit(dtype), min(unit(dtype), unit(torch.float32))


def float64(*arrays):
    return [x.detach().double().numpy() if numerics.is_torch(x) else x.astype(np.float64) for x in arrays]


def computing(W, u):
    """A bound on the error of the decompositions, which run in at least float32.

    `leading_svd` allows each of four defects max(64, sqrt(m + n)) spacings, of two roundings each.
    """
    return 4 * 2 * max(64, math.sqrt(sum(W.shape))) * u * np.linalg.norm(W, 2)


def scaling_twice(r):
    """Roundings of s * B @ A from given triples: two roots, a quotient, a product and a cast for A and for B; r + 1.

    Their size is ||W||: the entries of r triples add up to no more, for rows of U and V are no longer than 1.
    """
    return 2 * 5 + r + 1


def storing(W, r, u):
    """What rounding every entry of A and B once, to unit roundoff u, changes in s * B @ A."""
    return 3 * u * r * np.linalg.norm(W, 2)


def assert_adds_up(weight, made, s, u, u_computing):
    """W = residual + s * B @ A but for the rounding of the residual itself, and of the sum of its r products."""
    W, A, B, residual = float64(weight, made.A, made.B, made.residual)
    r = len(A)
    size = np.abs(W) + s * np.abs(B) @ np.abs(A)
    library = torch if numerics.is_torch(weight) else np
    smallest = float(library.finfo(weight.dtype).tiny) * u  # half the spacing of subnormal numbers
    assert (np.abs(residual + s * B @ A - W) <= u * np.abs(residual) + (r + 3) * u_computing * size + smallest).all()
    assert made.exact
    for got in made[:3]:
        assert type(got) is type(weight)
        assert got.dtype == weight.dtype


@given(weights())
def test_pissa_takes_out_the_best_approximation_of_rank_r(case):
    weight, W, r, s, u, u_computing = case
    made = pissa(weight, r, s)
    assert_adds_up(weight, made, s, u, u_computing)
    A, B, residual = float64(*made[:3])
    assert (A.shape, B.shape) == ((r, W.shape[1]), (len(W), r))
    S = np.linalg.svd(W, compute_uv=False)
    error = computing(W, u_computing) * math.sqrt(r) + storing(W, r, u) * (u > u_computing)
    # Eckart-Young, Q2: what is left has the remaining singular values
    left = np.linalg.svd(W - s * B @ A, compute_uv=False)
    assert np.abs(left[: len(S) - r] - S[r:]).max(initial=0) <= error
    # Q2: balanced, mutually orthogonal factors; both sides of the residual free of them
    for gram in (A @ A.T, B.T @ B):
        assert np.abs(s * gram - np.diag(S[:r])).max() <= error
    rounded = error + u * np.linalg.norm(residual)
    assert np.linalg.norm(math.sqrt(s) * B.T @ residual, 2) <= math.sqrt(max(S[0], rounded)) * rounded * 2
    assert np.linalg.norm(math.sqrt(s) * residual @ A.T, 2) <= math.sqrt(max(S[0], rounded)) * rounded * 2
    assert (A.max(1) >= (1 - 4 * u) * np.abs(A).max(1)).all()  # the sign rule; rounding may make a tie


@given(weights(), scalings)
def test_what_pissa_takes_out_does_not_depend_on_alpha(case, other):
    weight, W, r, s, u, _ = case
    (A, B), (A2, B2) = (float64(*pissa(weight, r, x)[:2]) for x in (s, other))
    # the same triples, scaled twice: only the scaling and the storing are rounded differently
    assert np.abs(s * B @ A - other * B2 @ A2).max() <= 2 * scaling_twice(r) * u * np.linalg.norm(W, 2)


@given(weights(), st.integers(0, 4))
def test_pissa_niter_adds_up_however_near_it_is(case, niter):
    weight, W, r, s, u, u_computing = case
    made = pissa(weight, r, s, niter=niter)
    assert_adds_up(weight, made, s, u, u_computing)
    A, B = float64(*made[:2])
    again = pissa(weight, r, s, niter=niter)
    assert all((x == y).all() for x, y in zip(made[:3], again[:3], strict=True))
    S = np.linalg.svd(W, compute_uv=False)
    error = computing(W, u_computing) * math.sqrt(r) + storing(W, r, u) * (u > u_computing)
    # Q^T W is W seen from fewer sides: no singular value grows, and each is shared evenly by A and B
    for gram in (A @ A.T, B.T @ B):
        assert (np.diag(s * gram) <= S[:r] + error).all()
        assert np.abs(s * gram - np.diag(np.diag(s * gram))).max() <= error


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_pissa_niter_uses_the_randomised_decomposition(library):
    W = library(matrix(0, (40, 60), "flat"))
    for niter in (0, 2):
        U, S, Vh = numerics.randomized_svd(W, 4, niter)
        A, B, *_ = pissa(W, 4, 2.0, niter=niter)
        close(2.0 * B @ A, (U * S) @ Vh, terms=scaling_twice(4), size=1.0)
    rng = np.random.default_rng(5) if library is np.asarray else torch.Generator().manual_seed(5)
    assert np.abs(float64(pissa(W, 4, 2.0, rng, niter=2).A - A)[0]).max() > 0.01  # drawn from the rng that is given


def test_pissa_by_hand():
    """W = 4 u1 v1^T + 1 u2 v2^T with u1 = v1 = (1, 1)/sqrt 2, u2 = v2 = (1, -1)/sqrt 2; s = 4: sqrt(4 / 4) = 1."""
    W = np.array([[2.5, 1.5], [1.5, 2.5]])
    half = math.sqrt(0.5)
    for weight in (W, torch.from_numpy(W)):
        A, B, residual = float64(*pissa(weight, 1, 4.0)[:3])
        # a decomposition of 2 by 2 numbers; a rounding of W turns its directions by 1 / (4 - 1)
        terms = 8 * 4 * (1 + 4 / 3)
        close(A, [[half, half]], terms, size=half)
        close(B, [[half], [half]], terms, size=half)
        close(residual, [[0.5, -0.5], [-0.5, 0.5]], terms, size=4.0)


@given(weights())
def test_olora_is_the_head_of_the_qr_decomposition(case):
    weight, W, r, s, u, u_computing = case
    made = olora(weight, r, s)
    assert_adds_up(weight, made, s, u, u_computing)
    A, B, residual = float64(*made[:3])
    rounding = 64 * u_computing * r + 3 * u * math.sqrt(r) * (u > u_computing)
    assert np.abs(B.T @ B - np.eye(r)).max() <= rounding
    assert (np.tril(A[:, :r], -1) == 0).all()  # exactly
    assert (A.diagonal() >= 0).all()
    norms = np.linalg.norm(W, axis=0)
    assert (np.linalg.norm((W - B @ A)[:, :r], axis=0) <= rounding * math.sqrt(r) * norms[:r]).all()
    assert (np.abs(A - B.T @ W) <= 2 * rounding * math.sqrt(r) * norms).all()  # R = Q^T W
    if s == 1:
        assert (np.linalg.norm(residual[:, :r], axis=0) <= 2 * rounding * math.sqrt(r) * norms[:r]).all()
    A2, B2 = float64(*olora(weight, r, 2 * s)[:2])
    assert (A2 == A).all()
    assert (B2 == B).all()


def test_olora_by_hand():
    """W = Q R with Q = [[3, -4], [4, 3]] / 5 and R = [[5, 1], [0, 2]]."""
    W = np.array([[3.0, -1.0], [4.0, 2.0]])
    for weight in (W, torch.from_numpy(W)):
        A, B, residual = float64(*olora(weight, 1, 2.0)[:3])
        close(A, [[5.0, 1.0]], terms=8 * 4, size=5.0)  # a decomposition of 2 by 2 numbers
        close(B, [[0.6], [0.8]], terms=8 * 4, size=1.0)
        close(residual, [[-3.0, -2.2], [-4.0, 0.4]], terms=8 * 4 + 2, size=4 + 2 * 5)  # W - 2 B A


@given(weights())
def test_mica_keeps_the_base_and_points_at_the_smallest_directions(case):
    weight, W, r, s, u, u_computing = case
    made = mica(weight, r, s)
    assert made.residual is None
    A, B = float64(*made[:2])
    assert (A.shape, B.shape) == ((r, W.shape[1]), (len(W), r))
    assert made.A.dtype == made.B.dtype == weight.dtype
    assert not A.any()
    rounding = 64 * u_computing * math.sqrt(sum(W.shape)) + 3 * u * math.sqrt(r) * (u > u_computing)
    assert np.abs(B.T @ B - np.eye(r)).max() <= rounding
    smallest = np.linalg.svd(W, compute_uv=False)[-r:]
    got = np.linalg.svd(B.T @ W, compute_uv=False)
    assert np.abs(got - smallest).max() <= rounding * math.sqrt(r) * np.linalg.norm(W, 2)


def of_two_decompositions(shape):
    """Roundings of one of a decaying matrix and another: 8 m n each (Higham, Accuracy and Stability, 19.4, 8 for c).

    A rounding turns a singular vector by 1 / gap: neighbouring singular values k, k + 1 are 1 / (k (k + 1)) apart.
    """
    return 2 * 8 * math.prod(shape) * min(shape) ** 2


@pytest.mark.parametrize("method", [pissa, olora, mica])
@given(seed=seeds, shape=st.sampled_from([(6, 6), (20, 12), (12, 20)]), r=st.integers(1, 6), s=scalings)
def test_numpy_and_torch_agree_to_rounding(method, seed, shape, r, s):
    W = matrix(seed, shape, "decaying")
    of_numpy, of_torch = float64(*method(W, r, s)[:2]), float64(*method(torch.from_numpy(W), r, s)[:2])
    for x, y in zip(of_numpy, of_torch, strict=True):
        close(x, y, terms=of_two_decompositions(shape), size=max(np.linalg.norm(x, 2), 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "method"), [("pissa", pissa), ("olora", olora), ("mica", mica)])
@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_peft_has_the_same_products_and_residuals(name, method, dtype, shape):
    W = torch.from_numpy(matrix(1, shape, "decaying")).to(dtype)
    model = nn.Sequential(nn.Linear(shape[1], shape[0], bias=False, dtype=dtype))
    model[0].weight.data = W.clone()
    config = peft.LoraConfig(r=4, lora_alpha=10, init_lora_weights=name, target_modules=["0"])
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    A, B, residual = float64(theirs.lora_A["default"].weight, theirs.lora_B["default"].weight, theirs.weight)[:3]
    made = method(W, 4, 2.5)
    A2, B2, residual2 = float64(made.A, made.B, W if made.residual is None else made.residual)
    u, u_computing = unit(dtype), unit(torch.float32)
    gap = 0 if name == "olora" else min(shape) ** 2  # how far singular values are apart, as above
    # the two roots of m n: two decompositions in float32 do not have all their roundings in one direction
    # (Higham and Mary, 2019, doi 10.1137/18M1226312)
    bound = 8 * u * 4 * 2.5 + 2 * 8 * math.sqrt(math.prod(shape)) * u_computing * (1 + gap)
    assert np.abs(2.5 * (B @ A - B2 @ A2)).max() <= bound
    assert np.abs(residual - residual2).max() <= bound
    assert np.abs(B @ B.T - B2 @ B2.T).max() <= bound  # the same subspace, whatever the signs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [pissa, olora])
def test_in_half_precision_only_the_residual_is_rounded(method, dtype):
    """T4. With the residual of unrounded factors the error would be that of s * B @ A, many times more."""
    W = torch.from_numpy(matrix(2, (64, 48), "decaying")).to(dtype)
    for r in (4, 48):
        made = method(W, r, 0.5)
        A, B, residual, exact = float64(*made[:3], W)
        allowed = unit(dtype) * np.abs(residual) + (r + 3) * unit(torch.float32) * (0.5 * np.abs(B) @ np.abs(A))
        assert (
            np.abs(residual + 0.5 * B @ A - exact) <= allowed + unit(torch.float32) * np.abs(exact) + 2.0**-25
        ).all()
        with_unrounded = float64(numerics.cast(method(W.float(), r, 0.5).residual, W))[0]
        naive = np.linalg.norm(with_unrounded + 0.5 * B @ A - exact)
        assert np.linalg.norm(residual + 0.5 * B @ A - exact) < naive


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("method", [pissa, olora, mica])
def test_what_cannot_be_taken_out_is_refused(method, library):
    W = library(np.eye(3, 4))
    with pytest.raises(ValueError, match=f"'{method.__name__}' needs r <= min.in, out. = 3, r=4"):
        method(W, 4, 1.0)
    for bad in (np.nan, np.inf):
        spoilt = np.eye(3, 4)
        spoilt[2, 3] = bad
        with pytest.raises(ValueError, match="NaN or infinite"):
            method(library(spoilt), 2, 1.0)
    if method is not mica:
        for scaling in (0.0, -1.0):
            with pytest.raises(ValueError, match="lora_alpha must be > 0"):
                method(W, 2, scaling)


@pytest.mark.parametrize("method", [pissa, olora, mica])
def test_the_weight_itself_is_left_alone(method):
    W = torch.from_numpy(matrix(0, (12, 9), "decaying"))
    for weight in (W, W.numpy(), W.T, W.T.numpy(), W.T.contiguous()):  # and any layout gives the same
        before = weight.clone() if numerics.is_torch(weight) else weight.copy()
        made = method(weight, 3, 2.0)
        assert (weight == before).all()
        same = method(before, 3, 2.0)
        got, want = (float64(x.A, x.B) for x in (made, same))
        for x, y in zip(got, want, strict=True):
            close(x, y, terms=of_two_decompositions(W.shape), size=max(np.linalg.norm(x, 2), 1))


@pytest.mark.parametrize("columns", ["zero", "equal", "zero weight"])
def test_olora_of_dependent_leading_columns(columns):
    W = matrix(3, (8, 6), "decaying")
    W[:, :3] = W[:, :1] if columns == "equal" else 0
    W *= columns != "zero weight"
    for weight in (W, torch.from_numpy(W), torch.from_numpy(W).bfloat16()):
        u = unit(weight.dtype) if numerics.is_torch(weight) else unit(torch.float64)
        made = olora(weight, 4, 2.0)
        assert_adds_up(weight, made, 2.0, u, min(u, unit(torch.float32)))
        A, B = float64(*made[:2])
        assert np.abs(B.T @ B - np.eye(4)).max() <= 64 * u
        assert (np.tril(A[:, :4], -1) == 0).all()


def test_pissa_has_a_scaling_of_one_by_default() -> None:
    W = np.diag([4.0, 1.0])
    A, B, residual, _ = pissa(W, 1)
    agree(B @ A, np.diag([4.0, 0.0]))
    agree(residual, np.diag([0.0, 1.0]))
