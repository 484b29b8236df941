"""Principal components of batches, and the eigenproblem behind them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.decomposition import IncrementalPCA

from lora_ref.numerics import leading, pca
from spec_tests import close

U64 = 2.0**-53  # unit roundoff of float64

seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 12)
spectra = st.sampled_from(["decaying", "flat", "deficient", "zero"])
libraries = st.sampled_from([np.asarray, torch.from_numpy])


def batches(seed, n_in, lengths, spectrum="decaying", mean=0.0):
    rng = np.random.default_rng(seed)
    size = {"decaying": 2.0 ** -np.arange(n_in), "flat": np.ones(n_in), "zero": np.zeros(n_in)}
    size["deficient"] = size["flat"] * (np.arange(n_in) < max(1, n_in // 2))
    turn = np.linalg.qr(rng.standard_normal((n_in, n_in)))[0]
    return [rng.standard_normal((m, n_in)) * size[spectrum] @ turn + mean for m in lengths]


def moments(parts, library=np.asarray):
    found = None
    for part in parts:
        found = pca.update(found, library(part))
    return found


def scatter(found):
    kept = np.asarray(found.kept)
    return np.triu(kept) + np.triu(kept, 1).T if found.squared else kept.T @ kept


def roundings(X):
    """How far the mean, and an entry of the scatter, of these rows may be off. They come in 5 batches at most.

    A mean: 4 operations a batch, relative to the mean. A scatter: 10 operations a batch and the products, relative to
    itself; and what the means are off by, squared and times the spread.
    """
    off, spread = 20 * U64 * len(X) * abs(X).max(), np.linalg.norm(X - X.mean(0))
    return off, (50 + len(X)) * U64 * spread**2 + len(X) * off**2 + 2 * off * math.sqrt(len(X)) * spread


def uncertain(X):
    """How far an eigenvalue of the scatter may be off: by the error's norm, and 8 n^2 roundings of the decomposition.

    The norm of |X|^T |X| is at most the sum of squares, so the roundings of all entries together are those of one sum.
    """
    n = X.shape[1]
    return roundings(X)[1] + 8 * n**2 * U64 * np.linalg.norm(X - X.mean(0)) ** 2


@given(seeds, sizes, st.lists(sizes, min_size=1, max_size=5), spectra, st.sampled_from([0.0, 3.0, 1e4]), libraries)
def test_moments_of_batches_are_those_of_all_rows(seed, n_in, lengths, spectrum, mean, library):
    parts = batches(seed, n_in, lengths, spectrum, mean)
    X = np.concatenate(parts)
    found = moments(parts, library)
    centred = X - X.mean(0)
    off, bound = roundings(X)
    assert found.seen == len(X)
    assert np.abs(np.asarray(found.mean) - X.mean(0)).max() <= off
    assert np.abs(scatter(found) - centred.T @ centred).max() <= bound


@given(seeds, sizes, st.lists(sizes, min_size=1, max_size=5), spectra, libraries, st.data())
def test_components_are_the_principal_components_of_all_rows(seed, n_in, lengths, spectrum, library, data):
    parts = batches(seed, n_in, lengths, spectrum, mean=1.0)
    X = np.concatenate(parts)
    n = data.draw(st.integers(1, min(X.shape)))
    vectors, singular_values, ratios = (np.asarray(x) for x in pca.components(moments(parts, library), n))
    S, Vh = np.linalg.svd(X - X.mean(0))[1:]
    S = np.concatenate([S, np.zeros(n_in)])
    size = uncertain(X)
    close(vectors @ vectors.T, np.eye(n), terms=8 * n_in * n, size=1.0)  # QR, or a symmetric eigenproblem
    assert np.abs(singular_values**2 - S[:n] ** 2).max() <= size + n_in * pca.EPS * S[0] ** 2
    assert (np.diff(singular_values) <= 0).all()
    # the sum of all is off by `size` for each, and what is too small is 0
    assert np.abs(ratios * (S**2).sum() - S[:n] ** 2).max() <= (1 + n_in) * size + n_in * pca.EPS * S[0] ** 2
    assert (vectors[range(n), abs(vectors).argmax(1)] > 0).all()
    for i in range(n):
        gap = min(abs(S[i] ** 2 - np.delete(S[:n_in], i) ** 2), default=1.0)
        if gap > 2 * size:  # the direction is determined, to size / gap
            assert 1 - abs(vectors[i] @ Vh[i]) <= (2 * size / gap) ** 2 + 8 * n_in * n * U64


@given(seeds, sizes, st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_equal_to_scikit_learn_fed_the_same_batches(seed, n_in, more):
    parts = batches(seed, n_in, [n_in + 1 + m for m in more], "decaying", mean=0.5)  # so none is truncated
    theirs = IncrementalPCA()
    for part in parts:
        theirs.partial_fit(part)
    n = min(n_in, 5)
    ours = pca.components(moments(parts), n)
    assert_are_those_of(ours, theirs, np.concatenate(parts), n)


def assert_are_those_of(ours, theirs, X, n):
    """Each is off by as much as the squares are uncertain; a direction, by that over the gap to its neighbours."""
    S, size = theirs.singular_values_, uncertain(X)
    gaps = np.array([min(abs(S[i] ** 2 - np.delete(S, i) ** 2), default=S[0] ** 2) for i in range(n)])
    assert (np.linalg.norm(np.asarray(ours.vectors) - theirs.components_[:n], axis=1) <= 4 * size / gaps).all()
    assert (np.abs(np.asarray(ours.singular_values) - S[:n]) <= 2 * size / S[:n]).all()
    bound = 2 * (1 + X.shape[1]) * size / (S**2).sum()
    assert np.abs(np.asarray(ours.ratios) - theirs.explained_variance_ratio_[:n]).max() <= bound


def test_equal_to_scikit_learn_on_wide_rows():
    parts = batches(0, 40, [60, 50, 41, 200], "decaying", mean=2.0)
    theirs = IncrementalPCA()
    for part in parts:
        theirs.partial_fit(part)
    for library in (np.asarray, torch.from_numpy):
        ours = pca.components(moments(parts, library), 6)
        assert_are_those_of(ours, theirs, np.concatenate(parts), 6)


def test_a_truncating_incremental_pca_is_not_exact_and_this_is():
    parts = batches(1, 60, [30] * 20, "flat")
    parts = [part * 0.98 ** np.arange(60) for part in parts]
    X = np.concatenate(parts)
    S, Vh = np.linalg.svd(X - X.mean(0))[1:]
    best = Vh[:4]
    theirs = IncrementalPCA(n_components=4)
    for part in parts:
        theirs.partial_fit(part)
    lost = {name: 4 - np.linalg.norm(V @ best.T) ** 2 for name, V in {"theirs": theirs.components_}.items()}
    ours = pca.components(moments(parts), 4).vectors
    assert lost["theirs"] > 0.1
    angle = 2 * uncertain(X) / (S[3] ** 2 - S[4] ** 2)  # of each of the four directions
    assert 4 - np.linalg.norm(ours @ best.T) ** 2 <= 4 * angle**2 + 8 * 60 * 4 * U64


def test_by_hand():
    found = moments([np.array([[3.0, 1.0], [1.0, 1.0]]), np.array([[2.0, 3.0], [2.0, -1.0]])])
    assert found.mean.tolist() == [2.0, 1.0]
    assert found.kept.tolist() == [[2.0, 0.0], [0.0, 8.0]]
    vectors, singular_values, ratios = pca.components(found, 2)
    assert abs(vectors).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    close(singular_values**2, [8.0, 2.0], terms=2, size=[8.0, 2.0])  # a root and a square
    close(ratios, [0.8, 0.2], terms=2, size=[0.8, 0.2])


def test_a_large_mean_costs_no_more_than_its_own_rounding():
    mean, grid = 2.0**36, np.random.default_rng(0).integers(-1000, 1000, (3, 50, 6)) * [1, 2, 4, 8, 16, 32]
    near, far = (pca.components(moments(list(grid + shift)), 6) for shift in (0.0, mean))  # the data are exact
    off = 2 * U64 * mean * math.sqrt(grid.size)  # as if each number had been rounded twice
    assert np.abs(near.singular_values - far.singular_values).max() <= off  # squares of the mean: 2^72 * U64 * 150
    gap = -np.diff(near.singular_values).max()
    assert np.abs(near.vectors - far.vectors).max() <= 2 * off / gap


@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), seeds)
def test_low_precision_is_squared_in_float64(dtype, seed):
    X = torch.from_numpy(batches(seed, 6, [40])[0]).to(dtype)
    found, exact = pca.components(pca.update(None, X), 6), pca.components(pca.update(None, X.double()), 6)
    assert all(x.dtype == torch.float64 and torch.equal(x, y) for x, y in zip(found, exact, strict=True))


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_what_cannot_be_learnt_from_is_refused(library):
    for bad, message in (
        (np.zeros((0, 3)), "no rows"),
        (np.array([[np.nan, 1.0]]), "NaN"),
        (np.array([[np.inf]]), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            pca.update(None, library(bad))
    found = pca.update(None, library(np.eye(3)[:2]))
    for n in (0, 3):
        with pytest.raises(ValueError, match=f"n={n} components of 2 rows of 3 numbers"):
            pca.components(found, n)


# -- the eigenproblem --------------------------------------------------------------------------


def symmetric(values, seed=0):
    Q = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return (Q * values) @ Q.T


@pytest.mark.parametrize(
    "values",
    [
        0.9 ** np.arange(300),
        np.ones(300),
        np.r_[np.full(20, 5.0), np.ones(280)],
        np.zeros(300),
        np.r_[7.0, np.zeros(299)],
    ],
    ids=["decaying", "all equal", "twenty equal", "zero", "rank 1"],
)
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_leading_eigenvalues_of_a_large_matrix(values, turned, library):
    C = symmetric(values) if turned else np.diag(values)
    found, V = (np.asarray(x) for x in pca.leading_eigh(library(C), 10))
    bound = 300 * 10 * U64 * max(values[0], 1e-300)
    assert np.abs(found - values[:10]).max() <= bound
    assert np.linalg.norm(C @ V - V * found) <= 10 * bound
    assert np.abs(V.T @ V - np.eye(10)).max() <= 300 * 100 * U64


@pytest.mark.parametrize("d", [1, 256, 257, 600])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_the_upper_triangle_of_a_square_is_whole(d, library):
    X = np.random.default_rng(0).standard_normal((5, d))
    S = np.asarray(pca._add_gram(library(np.ones((d, d))), library(X)))
    close(np.triu(S), np.triu(1 + X.T @ X), terms=6, size=1 + abs(X).T @ abs(X))  # 5 products and 1


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_without_lanczos_the_dense_decomposition_is_used(library, monkeypatch):
    C = symmetric(0.9 ** np.arange(300))
    calls = []
    monkeypatch.setattr(pca, "lanczos_svd", lambda C, n: calls.append(n))
    values, V = (np.asarray(x) for x in pca.leading_eigh(library(C), 5))
    assert calls == [5]
    close(values, 0.9 ** np.arange(5), terms=300 * 5, size=1.0)
    assert np.linalg.norm(C @ V - V * values) <= 300 * 5 * U64
    assert np.abs(V.T @ V - np.eye(5)).max() <= 300 * 5 * U64


@pytest.mark.parametrize("d", [20, 300])
@pytest.mark.parametrize("e", [-700, 0, 700])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_eigenvalues_of_matrices_of_any_size(d, e, library):
    C = symmetric(0.9 ** np.arange(d))
    values, V = (np.asarray(x) for x in pca.leading_eigh(library(C * 2.0**e), 2))
    close(values * 2.0**-e, 0.9 ** np.arange(2), terms=d * 2, size=1.0)
    close(C @ V, V * (values * 2.0**-e), terms=d * 2, size=1.0)


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
@given(seed=seeds)
def test_no_eigenvalue_is_negative(library, seed):
    """Of a matrix of rank 2 all others are 0, but for roundings of either sign."""
    X = np.random.default_rng(seed).standard_normal((2, 12))
    values, _ = pca.leading_eigh(library(X.T @ X), 12)
    assert (np.asarray(values) >= 0).all()


@given(seeds, st.sampled_from([12, 300]), st.integers(1, 5), libraries)
def test_directions_that_the_data_do_not_have_are_exactly_zero(seed, n_in, rank, library):
    """Of rank k data, with more rows than columns or fewer: sigma is 0 from k on, and the rows are orthonormal."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rank, n_in))
    for rows in (10, 2 * n_in):
        X = rng.standard_normal((rows, rank)) @ mixed
        vectors, sigma, ratios = (np.asarray(x) for x in pca.components(moments([X - X.mean(0)], library), 8))
        assert (sigma[:rank] > 0).all()
        assert not sigma[rank:].any()
        assert not ratios[rank:].any()
        close(vectors @ vectors.T, np.eye(8), terms=8 * n_in * 8, size=1.0)


@pytest.mark.parametrize("values", [np.ones(300), np.repeat([2.0, 1.0, 0.0], 100), np.r_[7.0, np.zeros(299)]])
def test_the_same_matrix_has_the_same_eigenvectors_every_time(values):
    """Here many directions are equally good, and the Krylov space ends early."""
    C = np.diag(values)
    made, again = (pca.leading_eigh(C, 10) for _ in range(2))
    close(made[0], values[:10], terms=300 * 10, size=values[0])
    if leading.arpack()[1]:  # SciPy before 1.17 cannot seed what ARPACK draws then
        assert all((x == y).all() for x, y in zip(made, again, strict=True))
