"""EVA's pure part: the sharing out of ranks, and the factors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ref.init.eva import eva, redistribute
from lora_ref.numerics import pca
from spec_tests import close

seeds = st.integers(0, 2**32 - 1)
libraries = st.sampled_from([np.asarray, torch.from_numpy])


def components(seed, n_in, n, library=np.asarray, directions=None):
    """n components of 20 rows that vary along so many directions, in all of them by default."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((n_in, n_in)))[0]
    sizes = 2.0 ** -np.arange(n_in) * (np.arange(n_in) < (n_in if directions is None else directions))
    return pca.components(pca.update(None, library(rng.standard_normal((20, n_in)) * sizes @ turn)), n)


@given(seeds, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.floats(1, 4), st.booleans())
def test_the_budget_is_kept_and_no_rank_is_above_its_limit(seed, r, rho, tied):
    rng = np.random.default_rng(seed)
    ranks = {f"layer{i}": x for i, x in enumerate(r)}
    ratios = {name: sorted(rng.random(round(x * rho)).tolist(), reverse=True) for name, x in ranks.items()}
    if tied:
        ratios = {name: [round(y, 1) for y in x] for name, x in ratios.items()}
    got = redistribute(ratios, ranks, rho)
    assert list(got) == list(ranks)
    assert sum(got.values()) == sum(r)
    assert all(got[name] <= round(x * rho) for name, x in ranks.items())
    taken = [x for name in got for x in ratios[name][: got[name]]]
    left = [x for name in got for x in ratios[name][got[name] :]]
    assert not left or min(taken) >= max(left)
    assert redistribute(ratios, ranks, 1.0) == ranks


def test_ranks_by_hand():
    ratios = {"a": [0.5, 0.3, 0.1, 0.0], "b": [0.9, 0.02, 0.01, 0.0], "c": [0.4, 0.35, 0.2, 0.05]}
    assert redistribute(ratios, {"a": 2, "b": 2, "c": 2}, 2.0) == {"a": 2, "b": 1, "c": 3}
    assert redistribute(ratios, {"a": 1, "b": 2, "c": 1}, 1.5) == {"a": 1, "b": 1, "c": 2}  # round(1.5) is 2
    shared = {"q": [0.5, 0.2], "k": [0.5, 0.2], "v": [0.5, 0.2]}  # the first of those that share gets the most
    assert redistribute(shared, {"q": 1, "k": 1, "v": 1}, 2.0) == {"q": 1, "k": 1, "v": 1}
    assert redistribute(shared | {"o": [0.1, 0.1]}, {"q": 1, "k": 1, "v": 1, "o": 1}, 2.0) == dict(q=2, k=1, v=1, o=0)


# -- factors -----------------------------------------------------------------------------------


@given(seeds, st.integers(1, 8), st.integers(1, 8), libraries, st.booleans(), st.data())
def test_the_factors_are_components_and_zero(seed, n_out, n_in, library, whiten, data):
    r = data.draw(st.integers(0, n_in))
    found = components(seed, n_in, n_in, library)
    A, B, residual, _ = eva(library(np.zeros((n_out, n_in))), r, components=found, whiten=whiten)
    assert residual is None
    assert B.shape == (n_out, r)
    assert not B.any()
    size = np.asarray(found.singular_values)[:r] if whiten else np.ones(r)
    gram = np.asarray(A @ A.T) * np.sqrt(size)[:, None] * np.sqrt(size)
    close(gram, np.eye(r), terms=8 * n_in**2 + n_in + 6, size=1.0)  # an eigenproblem, products, roots


def test_the_factors_come_in_the_weights_dtype():
    found = components(0, 4, 2, torch.from_numpy)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        A = eva(torch.zeros(3, 4, dtype=dtype), 2, components=found).A
        assert torch.equal(A, found.vectors.to(dtype))


def test_too_few_components_and_directions_without_variance_are_refused():
    found = components(0, 6, 5, directions=3)
    assert (found.singular_values[:3] > 0).all()
    assert found.singular_values[3:].tolist() == [0, 0]
    with pytest.raises(ValueError, match="only 5 components are known"):
        eva(np.zeros((2, 6)), 6, components=found)
    with pytest.raises(ValueError, match="fewer than r=4 directions"):
        eva(np.zeros((2, 6)), 4, components=found, whiten=True)
    assert np.isfinite(eva(np.zeros((2, 6)), 3, components=found, whiten=True).A).all()
