"""The truncated decompositions, against the dense one in float64; when they are left to it; and the array functions."""

import math
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import ArpackNoConvergence
from threadpoolctl import threadpool_limits

from lora_ref import numerics
from lora_ref.numerics import leading
from spec_tests import distance

EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}
NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
# on both sides of the size from which Lanczos is used, tall and wide
SHAPES = [(1, 1), (1, 7), (7, 1), (20, 12), (255, 300), (256, 256), (300, 256), (256, 400)]
SPECTRA = ["flat", "decaying", "low rank", "repeated", "two values", "large gap", "orthogonal", "zero"]
LAYOUTS = ["C", "Fortran", "rows of a larger one", "every second column", "reversed"]
shapes, spectra, ranks = st.sampled_from(SHAPES), st.sampled_from(SPECTRA), st.integers(1, 32)
seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(list(EPS))


def with_values(rng, shape, S):
    """A random float64 matrix with these singular values."""
    U, _ = np.linalg.qr(rng.standard_normal((shape[0], len(S))))
    V, _ = np.linalg.qr(rng.standard_normal((shape[1], len(S))))
    return (U * S) @ V.T


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
        "two values": np.where(index <= 20, 1.0, 0.5),
        "large gap": np.where(index <= 4, 1.0, 2.0**-20 / index),  # its square drowns in the rounding of 1 in float32
        "orthogonal": np.ones(m),
        "zero": np.zeros(m),
    }[spectrum]
    return with_values(rng, shape, S)


@st.composite
def any_spectrum(draw, m):
    """m falling singular values from 1 on: runs of equal ones, with gaps between them from 2^-30 to everything."""
    S, value = [], 1.0
    for _ in range(draw(st.integers(1, 12))):
        S += [value] * draw(st.sampled_from([1, 2, 3, 5, 20, 60, m]))
        value *= draw(st.sampled_from([1 - 2.0**-30, 1 - 2.0**-12, 0.99, 0.7, 2.0**-8, 2.0**-16, 0.0]))
    return np.array(S + [value / k for k in range(1, m + 1)])[:m]


def laid_out(W, layout):
    """The same matrix as a view of some memory, for an array or a tensor."""
    n, m = W.shape
    new = W.new_zeros if isinstance(W, torch.Tensor) else lambda shape: np.zeros(shape, W.dtype)
    if layout == "reversed" and isinstance(W, np.ndarray):  # torch has no negative strides
        return np.ascontiguousarray(W[::-1, ::-1])[::-1, ::-1]
    view = {
        "C": lambda: new((n, m)),
        "Fortran": lambda: new((m, n)).T,
        "rows of a larger one": lambda: new((n + 2, m + 3))[1:-1, 2:-1],
        "every second column": lambda: new((n, 2 * m))[:, ::2],
        "reversed": lambda: new((n, m)),
    }[layout]()
    view[:] = W
    return view


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


@given(st.data(), seeds, st.sampled_from([(256, 256), (300, 257), (256, 400)]), ranks, dtypes)
def test_repeated_values_and_gaps_of_every_size_are_found(data, seed, shape, r, dtype):
    W = with_values(np.random.default_rng(seed), shape, data.draw(any_spectrum(min(shape))))
    for given_as in in_both(W, dtype):
        assert_leading(np.asarray(given_as, dtype=np.float64), r, *numerics.leading_svd(given_as, r), EPS[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("shape", [(20, 12), (300, 256), (256, 300)])
def test_library_dtype_and_values_do_not_depend_on_the_layout(shape, dtype, layout):
    """The result has the library and the dtype of W. W stays as it is, and no gradient flows."""
    warnings.simplefilter("error")
    W = matrix(0, shape, "decaying")
    for given_as in in_both(W, dtype):
        W64 = np.asarray(given_as, dtype=np.float64)
        weight = laid_out(given_as, layout)
        if isinstance(weight, torch.Tensor):
            weight.requires_grad_()
        for made in (numerics.leading_svd(weight, 4), numerics.randomized_svd(weight, 4, niter=20)):
            assert {type(x) for x in made} == {type(given_as)}
            assert {x.dtype for x in made} == {given_as.dtype}
            assert not any(getattr(x, "requires_grad", False) for x in made)
            assert_leading(W64, 4, *made, EPS[dtype])
        assert (weight == given_as).all()


@given(seeds, st.sampled_from(["flat", "decaying", "repeated", "large gap"]), ranks, dtypes)
def test_the_transposed_matrix_has_the_same_triples(seed, spectrum, r, dtype):
    """U and V change places. Lanczos works on the smaller side of both, so nothing is rounded differently."""
    for W in in_both(matrix(seed, (300, 256), spectrum), dtype):
        one, other = leading.lanczos_svd(W, r), leading.lanczos_svd(W.T, r)
        assert (one is None) == (other is None)
        if one is None:
            continue  # not found in time
        (U, S, Vh), (U2, S2, Vh2) = one, other
        assert (U == Vh2.T).all() and (S == S2).all() and (Vh == U2.T).all()


@given(seeds, st.sampled_from([(300, 256), (256, 400)]), spectra, ranks, dtypes)
def test_arrays_and_tensors_have_the_same_triples_to_the_last_bit(seed, shape, spectrum, r, dtype):
    """They are computed from the same memory by the same code."""
    tensor, array = in_both(matrix(seed, shape, spectrum), dtype)
    made = leading.lanczos_svd(tensor, r), leading.lanczos_svd(array, r)
    assert (made[0] is None) == (made[1] is None)
    for x, y in zip(*(triples or () for triples in made), strict=True):
        assert (x.numpy() == y).all()


@pytest.fixture
def without_dense(monkeypatch):
    """Where the dense decomposition would be used, the test fails."""

    def refused(x):
        raise AssertionError("the dense decomposition is used")

    monkeypatch.setattr(leading, "svd", refused)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_lanczos_needs_no_help_where_it_is_used(spectrum, dtype, without_dense):
    W = matrix(0, (400, 320), spectrum)
    for given_as in in_both(W, dtype):
        for r in (1, 8, 40):
            assert_leading(np.asarray(given_as, dtype=np.float64), r, *numerics.leading_svd(given_as, r), EPS[dtype])


@pytest.mark.parametrize("e", [-90, -40, -20, 20, 40, 90])
@pytest.mark.parametrize("dtype", EPS)
def test_lanczos_needs_no_help_for_small_and_large_numbers(dtype, e, without_dense):
    """ARPACK has an absolute tolerance, which is made for eigenvalues near 1."""
    W = matrix(0, (300, 256), "flat")
    for given_as in in_both(W, dtype):
        U, S, Vh = numerics.leading_svd(given_as * 2.0**e, 8)
        assert_leading(np.asarray(given_as, dtype=np.float64), 8, U, np.asarray(S) * 2.0**-e, Vh, EPS[dtype])


@pytest.mark.parametrize(
    ("shape", "r", "used"), [((255, 300), 1, False), ((256, 300), 32, True), ((300, 256), 33, False)]
)
def test_small_matrices_and_large_ranks_are_left_to_the_dense_decomposition(shape, r, used):
    for W in in_both(matrix(0, shape, "decaying"), torch.float32):
        assert (leading.lanczos_svd(W, r) is not None) is used


def test_another_device_than_the_cpu_is_left_to_torch():
    assert leading.lanczos_svd(torch.zeros(300, 256, device="meta"), 4) is None


@pytest.mark.parametrize("layout", ["C", "Fortran"])
def test_the_matrix_is_not_copied(layout):
    for W in in_both(matrix(0, (1500, 1200), "decaying"), torch.float32):
        weight = laid_out(W, layout)
        numerics.leading_svd(weight, 2)  # what is loaded or compiled at the first call
        tracemalloc.start()
        numerics.leading_svd(weight, 2)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < weight.nbytes / 2


def fails(*args, **kwargs):
    raise ArpackNoConvergence("not found in time", np.zeros(0), np.zeros((0, 0)))


def nothing_found(C, k, v0, **options):
    return np.full(k, np.nan), np.full((len(v0), k), np.nan, v0.dtype)


@pytest.mark.parametrize("faulty", [fails, nothing_found])
def test_without_convergence_the_dense_decomposition_is_used(faulty, monkeypatch):
    W = matrix(0, (300, 256), "flat")
    monkeypatch.setattr(leading.arpack()[0], "eigsh", faulty)
    assert leading.lanczos_svd(W, 8) is None
    assert_leading(W, 8, *numerics.leading_svd(W, 8), EPS[torch.float64])


def test_one_pass_is_not_believed(monkeypatch):
    """What it found is right, but only a second pass shows that nothing is missing."""
    W = matrix(0, (300, 256), "decaying")
    monkeypatch.setattr(leading, "PASSES", 1)
    assert leading.lanczos_svd(W, 8) is None


def spoiled(name, values, X):
    """Eigenvectors (rising) that are wrong in one way each, with values that look right."""
    k, rng = X.shape[1], np.random.default_rng(5)
    if name == "the largest are missed":
        return values[:-2], X[:, :-2]
    if name == "the smallest are missed":
        return values[2:], X[:, 2:]
    if name == "one in the middle is missed":
        return np.delete(values, k // 2), np.delete(X, k // 2, axis=1)
    if name == "a wrong vector":
        return values, X + 1e-5 * rng.standard_normal(X.shape) * (np.arange(k) == k - 2)
    if name == "inexact vectors":
        return values, X + 1e-9 * rng.standard_normal(X.shape)
    if name == "one vector twice":
        return values, X[:, [*range(k - 1), k - 2]]
    if name == "random vectors":
        return values, np.linalg.qr(rng.standard_normal(X.shape))[0]
    return values, X * [1] * 0 if name == "zero" else X[:, ::-1]


@pytest.mark.parametrize("spectrum", ["decaying", "repeated", "low rank"])
@pytest.mark.parametrize(
    "name",
    [
        *("the largest are missed", "the smallest are missed", "one in the middle is missed", "a wrong vector"),
        *("inexact vectors", "one vector twice", "random vectors", "zero", "another order"),
    ],
)
def test_the_next_pass_mends_what_one_pass_has_wrong(name, spectrum, monkeypatch, without_dense):
    W = matrix(0, (300, 256), spectrum)
    arpack, largest, passes, calls = leading.arpack()[0], leading._largest, [], []
    eigsh = arpack.eigsh

    def faulty(C, k, **options):
        calls.append(name)
        more = 2 * (len(calls) == 1 and name == "the largest are missed")  # so that the number is right
        found = eigsh(C, k + more, **options)
        return spoiled(name, *found) if len(calls) == 1 else found

    monkeypatch.setattr(arpack, "eigsh", faulty)
    monkeypatch.setattr(leading, "_largest", lambda *args: passes.append(name) or largest(*args))
    assert_leading(W, 6, *numerics.leading_svd(W, 6), EPS[torch.float64])
    assert calls and len(passes) > 1


@pytest.mark.parametrize("copies", [2, 5, 20])
def test_copies_that_every_pass_misses_but_one_are_found(copies, monkeypatch, without_dense):
    """In exact arithmetic Lanczos sees one copy of each singular value. Here it is made to."""
    S = np.r_[np.ones(copies), 1 / (2.0 + np.arange(256 - copies))]
    W = with_values(np.random.default_rng(0), (300, 256), S)
    if not leading.arpack()[1]:  # SciPy before 1.17 has no seed for an exhausted Krylov space, and may not converge
        monkeypatch.setattr(leading, "svd", numerics.svd)
    arpack, calls = leading.arpack()[0], []
    eigsh = arpack.eigsh

    def one_copy(C, k, **options):
        values, X = eigsh(C, k, **options)
        calls.append(k)
        new = np.r_[True, np.diff(values) > C.shape[0] * 64 * EPS[torch.float64] * values[-1]]  # else copies, rounded
        return values[new], X[:, new]

    monkeypatch.setattr(arpack, "eigsh", one_copy)
    monkeypatch.setattr(leading, "PASSES", 2 * copies + 2)
    assert_leading(W, 6, *numerics.leading_svd(W, 6), EPS[torch.float64])
    assert len(calls) > 2


EXACT = {
    "identity": np.eye(256),
    "permutation": np.eye(256)[np.random.default_rng(0).permutation(256)],
    "few values": np.diag(np.repeat([3.0, 2.0, 1.0], [3, 50, 203])),
    "ones": np.ones((256, 300)),
    "one row": np.eye(256)[:, :1] * np.ones(256),
    "two entries": np.diag(np.r_[1.0, 1.0, np.zeros(254)]),
    "blocks": np.kron(np.eye(2), np.ones((128, 128))),
    "zero": np.zeros((256, 256)),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("r", [1, 4, 10])
@pytest.mark.parametrize("dtype", EPS)
def test_where_the_krylov_space_ends_the_rest_is_found_and_is_the_same_every_time(name, r, dtype):
    """ARPACK continues with a random vector. SciPy before 1.17 has no seed for it."""
    assert leading.lanczos_svd(EXACT[name].astype(NUMPY[dtype]), r) is not None
    for W in in_both(EXACT[name], dtype):
        made, again = (numerics.leading_svd(W, r) for _ in range(2))
        assert_leading(EXACT[name], r, *made, EPS[dtype])
        if leading.arpack()[1]:
            assert all((x == y).all() for x, y in zip(made, again, strict=True))


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
    made = []
    for n in (1, 2, 2):
        torch.set_num_threads(n)
        try:
            with threadpool_limits(n, user_api="blas"):
                made.append(numerics.leading_svd(W, 8))
        finally:
            torch.set_num_threads(threads)
    one, two, again = made
    assert all(torch.equal(x, y) for x, y in zip(two, again, strict=True))
    products = [(U * S) @ Vh for U, S, Vh in (one, two)]
    gap = 1 / 8 - 1 / 9  # a perturbation of W moves its rank-r part by that much more
    assert torch.linalg.norm(products[0] - products[1]) <= 2 * 64 * EPS[torch.float32] * math.sqrt(8) / gap


# -- array functions -----------------------------------------------------------------------------


@given(seeds, st.sampled_from([(1, 1), (5, 3), (3, 5), (4, 4)]), st.sampled_from([(), (2, 3)]), dtypes)
def test_qr_has_one_sign_and_keeps_the_dtype(seed, shape, batch, dtype):
    X = np.random.default_rng(seed).standard_normal((*batch, *shape))
    for x in in_both(X, dtype):
        Q, R = numerics.qr(x)
        assert Q.dtype == R.dtype == x.dtype
        Q, R = (np.asarray(part, dtype=np.float64) for part in (Q, R))
        assert (np.diagonal(R, axis1=-2, axis2=-1) >= 0).all()
        assert (np.triu(R) == R).all()
        bound = 8 * math.prod(shape) * EPS[dtype]  # Higham, Accuracy and Stability, 19.4, with 8 for c
        assert np.abs(np.swapaxes(Q, -1, -2) @ Q - np.eye(min(shape))).max() <= bound
        assert np.abs(Q @ R - np.asarray(x, dtype=np.float64)).max() <= bound * max(np.linalg.norm(X), 1)


@pytest.mark.parametrize("name", ["leading_svd", "randomized_svd", "svd", "svd_of_product", "subtract_product"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numpys_precision_stays_at_least_float32(name, dtype):
    W, B, A = (x.astype(dtype) for x in (np.eye(300, 280), np.ones((300, 2)), np.ones((2, 280))))
    made = {
        "leading_svd": lambda: numerics.leading_svd(W, 2),
        "randomized_svd": lambda: numerics.randomized_svd(W, 2, 1),
        "svd": lambda: numerics.svd(W),
        "svd_of_product": lambda: numerics.svd_of_product(B, A),
        "subtract_product": lambda: [numerics.subtract_product(W, B, A, 2.0)],
    }[name]()
    assert {x.dtype for x in made} == {np.dtype(np.promote_types(dtype, np.float32))}


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(st.data(), st.integers(1, 40), st.booleans())
def test_is_finite_means_every_entry_however_large(dtype, data, n, spoilt):
    largest = torch.finfo(dtype).max
    x = torch.full((n,), data.draw(st.sampled_from([1.0, largest])), dtype=torch.float64)  # sums may overflow
    if spoilt:
        bad = [v for v in (math.nan, math.inf, -math.inf) if not torch.tensor(v).to(dtype).float().isfinite()]
        x[data.draw(st.integers(0, n - 1))] = data.draw(st.sampled_from(bad))
    x = x.to(dtype)  # torch 2.7 writes no infinite number into a float8
    warnings.simplefilter("error")
    assert numerics.is_finite(x) is not spoilt
    if dtype in (torch.float64, torch.float32, torch.float16):
        assert numerics.is_finite(x.numpy()) is not spoilt
        assert numerics.is_finite(x.requires_grad_()) is not spoilt


def test_nothing_is_finite():
    assert numerics.is_finite(np.zeros((0, 3)))
    assert numerics.is_finite(torch.zeros(0, 3))


@given(seeds, dtypes, st.integers(-1060, 1020), st.integers(1, 50))
def test_what_is_scaled_to_one_has_squares_and_comes_back(seed, dtype, e, n):
    info = torch.finfo(dtype)
    x = torch.from_numpy(np.random.default_rng(seed).uniform(0.5, 1, n)).to(dtype)
    x = numerics.times_2_to_the(x, max(min(e, 1000 if dtype is torch.float64 else 110), math.frexp(info.tiny)[1] + 1))
    x[0] *= -4  # the largest, negative
    for given_as in (x, x.numpy()):
        y, power = numerics.scaled_to_one(given_as)
        assert (numerics.times_2_to_the(y, power) == given_as).all()
        assert (power == 0) == (y is given_as)
        squares = (y**2).sum()
        assert info.tiny / info.eps < squares < info.max * info.eps
        assert power == 0 or 1 <= abs(y).max() < 2
