"""The pure functions, as laws: on NumPy arrays (the oracle) and on torch tensors alike."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lora_ref import init, numerics
from lora_ref.api import combination
from lora_ref.core import update as decomposition
from lora_ref.core.scaling import check_scaling, scaling
from lora_ref.safe.atomic import transaction
from spec_tests import close

U64 = 2.0**-53  # unit roundoff of float64

sizes = st.integers(1, 7)
batches = st.sampled_from([(), (3,)])
seeds = st.integers(0, 2**32 - 1)


def factors(seed, batch, n_out, n_in, r):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*batch, r, n_in)), rng.standard_normal((*batch, n_out, r))


def decomposing(n_out, n_in, r):
    """Roundings of `svd_of_product`: QR of B and of A, and SVD of what is between.

    A decomposition of m by n numbers has 8 m n (Higham, Accuracy and Stability, 19.4, with 8 for his constant c).
    """
    return 8 * (n_out * r + n_in * r + min(n_out, r) * min(n_in, r)) + r


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


@given(seeds, batches, sizes, sizes, st.lists(st.tuples(sizes, st.floats(-3, 3)), min_size=1, max_size=3))
def test_cat_is_the_weighted_sum_exactly_and_svd_at_full_rank_too(seed, batch, n_out, n_in, parts):
    pairs = [factors(seed + i, batch, n_out, n_in, r) for i, (r, _) in enumerate(parts)]
    As, Bs = [A for A, _ in pairs], [B for _, B in pairs]
    scales = [s for _, s in parts]
    want = sum(s * (B @ A) for s, A, B in zip(scales, As, Bs, strict=True))
    total = sum(r for r, _ in parts)
    # QR is backward stable by columns of the whole [B_1 B_2] and [s_1 A_1; s_2 A_2], not of each part
    size = np.linalg.norm(np.concatenate(Bs, -1)) * np.linalg.norm(
        np.concatenate([s * A for s, A in zip(scales, As, strict=True)], -2)
    )
    bound = 2 * decomposing(n_out, n_in, total) * U64 * size + 1e-300  # s may be subnormal
    for made in (combination.cat(As, Bs, scales), combination.svd(As, Bs, scales, total)):
        assert made.A.shape[-2] == made.B.shape[-1] == total
        assert np.abs(made.B @ made.A - want).max() <= bound
    torches = combination.svd([torch.from_numpy(A) for A in As], [torch.from_numpy(B) for B in Bs], scales, total)
    assert np.abs((torches.B @ torches.A).numpy() - want).max() <= bound


@given(seeds, sizes, sizes, sizes, st.integers(1, 6))
def test_svd_combination_leaves_the_smallest_possible_error(seed, n_out, n_in, rank, r):
    A, B = factors(seed, (), n_out, n_in, rank)
    made = combination.svd([A], [B], [1.0], r)
    left = np.linalg.svd(B @ A, compute_uv=False)[r:]  # Eckart-Young: no rank-r matrix comes nearer
    error = np.linalg.norm(B @ A - made.B @ made.A)
    bound = 2 * decomposing(n_out, n_in, rank) * U64 * np.linalg.norm(A) * np.linalg.norm(B)
    assert abs(error - math.sqrt((left**2).sum())) <= bound


@given(seeds, sizes, sizes, sizes, st.floats(-5, 5))
def test_linear_combination_of_one_adapter_is_that_adapter(seed, n_out, n_in, r, s):
    A, B = factors(seed, (), n_out, n_in, r)
    made = combination.linear([A], [B], [s])
    size = abs(s) * np.linalg.norm(A) * np.linalg.norm(B)
    # r products, s; and in both factors a root and a product
    assert np.abs(made.B @ made.A - s * (B @ A)).max() <= 2 * (r + 5) * U64 * size + 1e-300  # s may be subnormal


def test_linear_combination_refuses_unequal_ranks():
    with pytest.raises(ValueError, match="equal ranks"):
        combination.linear([np.ones((1, 2)), np.ones((2, 2))], [np.ones((2, 1)), np.ones((2, 2))], [1.0, 1.0])


@given(seeds, sizes, sizes, sizes, sizes)
def test_packing_experts_loses_nothing(seed, n_experts, n_out, n_in, r):
    A, B = factors(seed, (n_experts,), n_out, n_in, r)
    packed = decomposition.pack_experts(A, B)
    assert [x.shape for x in packed] == [(r * n_experts, n_in), (n_out, r * n_experts)]
    # statement D7, written out: B.reshape(out, r, E)
    assert np.array_equal(packed[1].reshape(n_out, r, n_experts)[:, :, n_experts - 1], B[n_experts - 1])
    back = decomposition.unpack_experts(*packed, n_experts)
    assert np.array_equal(back[0], A)
    assert np.array_equal(back[1], B)


@given(st.integers(1, 10**6), st.floats(-1e6, 1e6))
def test_rslora_is_louder_by_the_root_of_the_rank(r, alpha):
    want = math.sqrt(r) * scaling(r, alpha)
    # two roots, two quotients and a product; a subnormal quotient is off by half of 2^-1074
    bound = 5 * U64 * abs(want) + (1 + math.sqrt(r)) * 2.0**-1074
    assert abs(scaling(r, alpha, use_rslora=True) - want) <= bound


@pytest.mark.parametrize("method", ["uniform", "gaussian", "embedding", "orthogonal"])
@given(seed=seeds, n_out=sizes, n_in=sizes, half=st.integers(1, 4))
def test_these_initialisations_start_as_a_no_op_in_both_libraries(method, seed, n_out, n_in, half):
    function, W = getattr(init, method), np.zeros((n_out, n_in))
    for weight, rng in ((W, np.random.default_rng(seed)), (torch.from_numpy(W), torch.Generator().manual_seed(seed))):
        A, B, residual, _ = function(weight, 2 * half, 1.0, rng)
        assert A.shape == (2 * half, n_in)
        assert B.shape == (n_out, 2 * half)
        assert residual is None
        # QR leaves the rows behind A and B orthogonal to 8 r^2 roundings; the others have a factor of zeros
        terms = 8 * (2 * half) ** 2 if method == "orthogonal" else 0
        close(B @ A, 0 * (B @ A), terms, size=np.outer((B**2).sum(1) ** 0.5, (A**2).sum(0) ** 0.5))


def test_a_seed_fixes_the_draw():
    W = torch.zeros(3, 4)
    first, again = (init.uniform(W, 2, 1.0, torch.Generator().manual_seed(1)).A for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_transaction_that_fails_leaves_the_tree_as_it_was(error):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.notes = {"a": [1]}
    handle = net[0].register_forward_hook(lambda *args: None)
    hooks, weight, data = net[0]._forward_hooks, net[0].weight, net[0].weight.data
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(error), transaction(net):
        net.notes["b"] = 2
        net[0].weight.requires_grad_(False)
        net[0].weight.data = torch.zeros(2, 2)
        net[1].running_mean = torch.ones(2)
        net.register_buffer("extra", torch.ones(1))
        net[0]._forward_hooks.clear()
        net[1] = nn.Identity()
        raise error
    assert isinstance(net[1], nn.BatchNorm1d)
    assert net.notes == {"a": [1]}
    assert net[0].weight is weight
    assert weight.requires_grad
    assert weight.data_ptr() == data.data_ptr()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net[0]._forward_hooks is hooks
    handle.remove()
    assert not hooks  # the handle still reaches the dict


def test_a_scaling_leaves_room_for_dropout():
    assert check_scaling(-50.0, largest=100.0) == -50.0
    for s in (51.0, -51.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="numbers up to 1e\\+02 allow 50 at most"):
            check_scaling(s, largest=100.0)


def test_a_transaction_of_a_few_modules_gives_back_the_flags_of_parameters_in_others():
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt), transaction(net, modules=lambda: [net], flags=[other.weight]):
        net.left = other.weight.requires_grad_(False)
        raise KeyboardInterrupt
    assert other.weight.requires_grad and not hasattr(net, "left")


def test_a_transaction_that_succeeds_keeps_its_changes():
    net = nn.Sequential(nn.Linear(2, 2))
    with transaction(net):
        net[0] = nn.ReLU()
    assert isinstance(net[0], nn.ReLU)
