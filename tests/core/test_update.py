"""Experts in one packed factor, and the room that a scaling leaves. The suite has s and s B A."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import factors

from lora_ref.core import update as decomposition
from lora_ref.core.scaling import check_scaling

sizes = st.integers(1, 7)
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


def test_a_scaling_leaves_room_for_dropout():
    assert check_scaling(-50.0, largest=100.0) == -50.0
    for s in (51.0, -51.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="numbers up to 1e\\+02 allow 50 at most"):
            check_scaling(s, largest=100.0)
