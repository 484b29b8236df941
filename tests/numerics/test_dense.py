"""QR and SVD: unique by their signs, and the same on NumPy arrays and on torch tensors."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import decomposing, factors

from lora_ref import numerics

U64 = 2.0**-53  # unit roundoff of float64

sizes = st.integers(1, 7)
batches = st.sampled_from([(), (3,)])
seeds = st.integers(0, 2**32 - 1)


@given(seeds, batches, sizes, sizes, sizes)
def test_svd_of_a_product_is_the_svd_of_the_explicit_product(seed, batch, n_out, n_in, r):
    A, B = factors(seed, batch, n_out, n_in, r)
    U, S, Vh = numerics.svd_of_product(B, A)
    D = B @ A
    terms = decomposing(n_out, n_in, r)
    bound = 2 * terms * U64 * np.linalg.norm(B) * np.linalg.norm(A)
    assert np.abs((U * S[..., None, :]) @ Vh - D).max() <= bound
    assert np.abs(S - np.linalg.svd(D, compute_uv=False)[..., : S.shape[-1]]).max() <= bound
    for side in (U.swapaxes(-1, -2) @ U, Vh @ Vh.swapaxes(-1, -2)):
        assert np.abs(side - np.eye(S.shape[-1])).max() <= 2 * terms * U64
    T = numerics.svd_of_product(torch.from_numpy(B), torch.from_numpy(A))
    assert np.abs(T[1].numpy() - S).max() <= bound


@given(seeds, batches, sizes, sizes)
def test_qr_is_unique_by_its_signs(seed, batch, n, k):
    X = np.random.default_rng(seed).standard_normal((*batch, n, k))
    (Q, R), (Qt, Rt) = numerics.qr(X), numerics.qr(torch.from_numpy(X))
    assert (R.diagonal(axis1=-2, axis2=-1) >= 0).all()
    assert np.abs(Q @ R - X).max() <= (8 * n * k + k) * U64 * np.linalg.norm(X)
    condition = np.linalg.cond(R).max() if n >= k else np.linalg.cond(R[..., :n]).max()
    # both are off by 8 n k roundings of X, and R follows X by its condition, once by Q and once by R itself
    assert np.abs(Rt.numpy() - R).max() <= 2 * 2 * 8 * n * k * U64 * condition * np.linalg.norm(X)
    assert Qt.shape == Q.shape
