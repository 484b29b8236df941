"""The truncated decompositions, against the dense one in float64, and what happens when they must give up."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ref import numerics
from lora_ref.numerics import leading
from spec_tests import distance

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
# both sides of where the Krylov method begins: 16 blocks of 8 columns in half of the smaller side
SHAPES = [(1, 1), (1, 7), (7, 1), (20, 12), (256, 256), (300, 256), (256, 400)]
SPECTRA = ["flat", "decaying", "low rank", "repeated", "orthogonal", "zero"]
shapes, spectra, ranks = st.sampled_from(SHAPES), st.sampled_from(SPECTRA), st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(list(EPS))


def matrix(seed, shape, spectrum):
    """A float64 matrix with this kind of singular values, the largest about 1."""
    rng = np.random.default_rng(seed)
    m = min(shape)
    if spectrum == "flat":
        return rng.standard_normal(shape) / math.sqrt(sum(shape))
    index = np.arange(1, m + 1)
    S = {
        "decaying": 1.0 / index,
        "low rank": np.where(index <= 3, 1.0 / index, 0.0),
        "repeated": np.where(index <= 5, 1.0, 0.5 / index),
        "orthogonal": np.ones(m),
        "zero": np.zeros(m),
    }[spectrum]
    U, _ = np.linalg.qr(rng.standard_normal((shape[0], m)))
    V, _ = np.linalg.qr(rng.standard_normal((shape[1], m)))
    return (U * S) @ V.T


def in_both(W, dtype):
    """W as torch and as NumPy have it."""
    return torch.from_numpy(W).to(dtype), torch.from_numpy(W).to(dtype).numpy()


def assert_leading(W, r, U, S, Vh, eps):
    """The r leading triples of the float64 matrix W, to the rounding `eps` of the computation."""
    U, S, Vh = (np.asarray(x, dtype=np.float64) for x in (U, S, Vh))
    r = min(r, *W.shape)
    assert (U.shape, S.shape, Vh.shape) == ((len(W), r), (r,), (r, W.shape[1]))
    want = np.linalg.svd(W, compute_uv=False)
    # `leading_svd` itself allows each of four defects max(64, sqrt(m + n)) spacings: of U, of Vh, of W v and of W^T u
    bound = eps * 4 * max(64, math.sqrt(sum(W.shape)))
    assert np.abs(U.T @ U - np.eye(r)).max() <= bound
    assert np.abs(Vh @ Vh.T - np.eye(r)).max() <= bound
    bound *= want[0]
    assert np.linalg.norm(W @ Vh.T - U * S, axis=0).max() <= bound
    assert np.linalg.norm(W.T @ U - Vh.T * S, axis=0).max() <= bound
    assert np.abs(S - want[:r]).max() <= bound  # Weyl: singular values move no more than the error
    left = np.linalg.norm(W - (U * S) @ Vh, 2)  # Eckart-Young
    assert left <= (want[r] if r < len(want) else 0) + bound * math.sqrt(r)
    assert (Vh[np.arange(r), np.abs(Vh).argmax(1)] > 0).all()  # the sign rule


@given(seeds, shapes, spectra, ranks, dtypes)
def test_leading_svd_is_the_head_of_the_dense_one(seed, shape, spectrum, r, dtype):
    W = matrix(seed, shape, spectrum)
    for given_as in in_both(W, dtype):
        assert_leading(np.asarray(given_as, dtype=np.float64), r, *numerics.leading_svd(given_as, r), EPS[dtype])


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_krylov_method_answers_by_itself_where_it_is_used(spectrum, dtype, monkeypatch):
    W = matrix(0, (400, 320), spectrum)
    shapes_of_dense = []
    dense = leading.svd
    monkeypatch.setattr(leading, "svd", lambda x: shapes_of_dense.append(tuple(x.shape)) or dense(x))
    for given_as in in_both(W, dtype):
        assert_leading(np.asarray(given_as, dtype=np.float64), 8, *numerics.leading_svd(given_as, 8), EPS[dtype])
    assert shapes_of_dense
    assert max(max(shape) for shape in shapes_of_dense) <= leading.LONGEST_BASIS * 8


def test_without_convergence_the_dense_decomposition_answers(monkeypatch):
    W = matrix(0, (300, 256), "flat")
    krylov, answers = leading._block_krylov, []
    monkeypatch.setattr(leading, "_block_krylov", lambda *args: answers.append(krylov(*args)))
    monkeypatch.setattr(leading, "PATIENCE", 3)
    assert_leading(W, 8, *numerics.leading_svd(W, 8), EPS[torch.float64])
    assert answers == [None]


def spoiled(name, U, S, Vh):
    """Triples that are wrong in one way each."""
    if name == "the largest is missed":
        return U[:, 1:], S[1:], Vh[1:]
    if name == "a wrong value":
        return U, S * (1 + 1e-9), Vh
    if name == "a wrong left vector":
        return U + 1e-9 * U[:, ::-1], S, Vh
    if name == "one triple twice":
        index = [*range(len(S) - 1), len(S) - 2]  # instead of the last: nothing larger is missing
        return U[:, index], S[index], Vh[index]
    return U * np.nan, S, Vh


@pytest.mark.parametrize(
    "name", ["the largest is missed", "a wrong value", "a wrong left vector", "one triple twice", "not a number"]
)
def test_what_does_not_verify_is_not_returned(name, monkeypatch):
    W = matrix(0, (300, 256), "decaying")
    krylov = leading._block_krylov
    calls = []

    def wrong(W, X, r, tolerance):
        calls.append(name)
        extra = name == "the largest is missed"
        return spoiled(name, *krylov(W, X, r + extra, tolerance))

    monkeypatch.setattr(leading, "_block_krylov", wrong)
    assert_leading(W, 6, *numerics.leading_svd(W, 6), EPS[torch.float64])
    assert calls == [name]


@pytest.mark.parametrize("n", [3, 256])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_entries_that_are_not_finite_are_refused(n, bad, library):
    W = np.eye(n)
    W[1, 2] = bad
    W = library(W)
    warnings.simplefilter("error")  # and nothing is computed with them first
    with pytest.raises(ValueError, match="NaN or infinite"):
        numerics.svd(W)
    with pytest.raises(ValueError, match="NaN or infinite"):
        numerics.leading_svd(W, 1)
    with pytest.raises(ValueError, match="NaN or infinite"):
        numerics.randomized_svd(W, 1, 1)


@given(seeds, st.sampled_from([(1, 1), (3, 5), (5, 3), (4, 4)]), st.sampled_from([(), (3,)]), dtypes)
def test_the_signs_of_the_svd_are_fixed(seed, shape, batch, dtype):
    X = np.random.default_rng(seed).standard_normal((*batch, *shape))
    for x in in_both(X, dtype):
        U, S, Vh = (np.asarray(part, dtype=np.float64) for part in numerics.svd(x))
        assert (np.take_along_axis(Vh, np.abs(Vh).argmax(-1)[..., None], -1) > 0).all()
        # 8 m n roundings, two to a spacing, of at most 16 numbers (Higham, Accuracy and Stability, 19.4, with 8 for c)
        assert np.abs((U * S[..., None, :]) @ Vh - np.asarray(x, dtype=np.float64)).max() <= 64 * EPS[dtype] * S.max()


@given(seeds, shapes, st.sampled_from(["decaying", "low rank", "zero"]), ranks, st.integers(0, 4), dtypes)
def test_randomized_svd_is_orthonormal_and_no_better_than_possible(seed, shape, spectrum, r, niter, dtype):
    W = matrix(seed, shape, spectrum)
    r = min(r, *shape)
    want = np.linalg.svd(W, compute_uv=False)
    bound = 4 * 64 * EPS[dtype]  # as in `assert_leading`
    for x in in_both(W, dtype):
        U, S, Vh = (np.asarray(part, dtype=np.float64) for part in numerics.randomized_svd(x, r, niter))
        assert np.abs(U.T @ U - np.eye(r)).max() <= bound
        assert np.abs(Vh @ Vh.T - np.eye(r)).max() <= bound
        assert np.abs(U.T @ W - S[:, None] * Vh).max() <= bound  # W^T u = s v holds, W v = s u only nearly
        assert (want[:r] + bound >= S).all()
        if spectrum != "decaying":  # the range of a matrix of rank <= 3 is found at once
            assert np.abs(S - want[:r]).max() <= bound


def test_four_iterations_are_within_one_percent_of_the_best_where_the_spectrum_decays():
    for seed in range(5):
        W = matrix(seed, (400, 300), "decaying")
        U, S, Vh = numerics.randomized_svd(W, 16, niter=4, rng=np.random.default_rng(seed))
        best_U, best_S, best_Vh = np.linalg.svd(W)
        best = (best_U[:, :16] * best_S[:16]) @ best_Vh[:16]
        assert np.linalg.norm((U * S) @ Vh - best) <= 0.01 * np.linalg.norm(best)


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_nothing_depends_on_the_global_generators(library):
    W = library(matrix(0, (300, 256), "flat"))
    made = []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        made.append([*numerics.leading_svd(W, 4), *numerics.randomized_svd(W, 4, 2)])
    assert all((x == y).all() for x, y in zip(*made, strict=True))
    other = numerics.randomized_svd(W, 4, 0, np.random.default_rng(1) if library is np.asarray else torch.Generator())
    assert distance(other[0], numerics.randomized_svd(W, 4, 0)[0]) > 0.01


def test_two_threads_agree_with_one_to_rounding():
    W = torch.from_numpy(matrix(0, (512, 512), "decaying")).float()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = numerics.leading_svd(W, 8)
    torch.set_num_threads(2)
    try:
        two = numerics.leading_svd(W, 8)
        again = numerics.leading_svd(W, 8)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(two, again, strict=True))
    products = [(U * S) @ Vh for U, S, Vh in (one, two)]
    gap = 1 / 8 - 1 / 9  # a perturbation of W moves its rank-r part by that much more
    assert torch.linalg.norm(products[0] - products[1]) <= 2 * 64 * EPS[torch.float32] * math.sqrt(8) / gap
