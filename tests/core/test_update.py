"""The pure functions, as laws: on NumPy arrays (the oracle) and on torch tensors alike."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import factors

from lora_ref.core import update as decomposition
from lora_ref.core.scaling import check_scaling, scaling

U64 = 2.0**-53  # unit roundoff of float64

sizes = st.integers(1, 7)
batches = st.sampled_from([(), (3,)])
seeds = st.integers(0, 2**32 - 1)


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


def test_a_scaling_leaves_room_for_dropout():
    assert check_scaling(-50.0, largest=100.0) == -50.0
    for s in (51.0, -51.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="numbers up to 1e\\+02 allow 50 at most"):
            check_scaling(s, largest=100.0)
