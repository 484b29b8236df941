"""`init_lora_weights="orthogonal"`: both factors drawn, their product zero."""

import math

import numpy as np
import pytest
import torch
from models import adapt
from torch import nn

from lora_ref.init.decompositions import orthogonal
from spec_tests import close


@pytest.mark.parametrize("r", [2, 8, 32])
def test_orthogonal_in_numpy(r: int) -> None:
    """In float64 B A is zero to its roundings, and the entries have standard deviation sqrt(1/2) / 10 for any r."""
    rng = np.random.default_rng(0)
    pairs = [orthogonal(np.zeros((50, 60)), r, rng=rng)[:2] for _ in range(100)]
    for A, B in pairs:
        size = np.outer(np.linalg.norm(B, axis=1), np.linalg.norm(A, axis=0))
        close(B @ A, np.zeros_like(size), terms=8 * r**2, size=size)  # QR: Higham, 19.4, with 8 for his c
    for factors, n in ((np.stack([A for A, _ in pairs]), 60), (np.stack([B for _, B in pairs]), 50)):
        independent = 100 * n * r // 2  # normal numbers behind the entries
        assert abs(factors.var() - 0.005) < 6 * 0.005 * math.sqrt(2 / independent)


def test_orthogonal_needs_an_even_rank_and_a_linear_layer() -> None:
    with pytest.raises(ValueError, match=r"^m: init_lora_weights='orthogonal' needs an even rank, r=3 is odd"):
        adapt(nn.Linear(4, 4), r=3, init_lora_weights="orthogonal")
    for module in (nn.Conv1d(4, 4, 1), nn.Embedding(4, 4)):
        with pytest.raises(ValueError, match=r"^m: init_lora_weights='orthogonal' is not available for"):
            adapt(module, r=2, init_lora_weights="orthogonal")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_factors_of_orthogonal_cancel_to_the_rounding_of_their_dtype(dtype: torch.dtype) -> None:
    """G1: B A = 0. The QR of r by r numbers leaves rows orthogonal to 8 r^2 roundings (Higham, 19.4, with 8 for c)."""
    for r in (2, 8, 16):
        A, B, residual, _ = orthogonal(torch.zeros(50, 60, dtype=dtype), r, 1.0, torch.Generator().manual_seed(0))
        assert residual is None
        size = np.outer(np.linalg.norm(B.numpy(), axis=1), np.linalg.norm(A.numpy(), axis=0))
        drawn_in = torch.promote_types(dtype, torch.float32)
        close(B.double() @ A.double(), np.zeros_like(size), terms=8 * r**2, size=size, dtype=drawn_in)
