"""Weighted combinations as functions of factors, on NumPy arrays and on torch tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import decomposing, factors
from torch import nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref.api import combination

U64 = 2.0**-53  # unit roundoff of float64

sizes = st.integers(1, 7)
batches = st.sampled_from([(), (3,)])
seeds = st.integers(0, 2**32 - 1)


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


def test_a_linear_combination_of_stacks_needs_equal_ranks() -> None:
    A, B = np.ones((3, 1, 2)), np.ones((3, 2, 1))
    with pytest.raises(ValueError, match=r"equal ranks, got \[1, 2\]"):
        combination.linear([A, np.ones((3, 2, 2))], [B, np.ones((3, 2, 2))], [1.0, 1.0])


def test_a_module_that_one_adapter_names_twice_is_saved_by_one_adapter() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], modules_to_save=["1", "1"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", "cat")
    assert model.peft_config["sum"].modules_to_save == ["1"]
