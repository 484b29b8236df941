"""The initialisations that draw, on NumPy arrays and on torch tensors."""

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref import init as inits
from lora_ref.core.inits import (
    METHODS,
    draw_normal,
    draw_uniform,
    embedding,
    embedding_unzeroed,
    gaussian,
    uniform,
    unzeroed,
)
from lora_ref.init.decompositions import orthogonal
from spec_tests import close

FALSE_ALARM = 1e-6  # how often numbers that follow a law may be taken for some that do not

sizes, seeds = st.integers(1, 7), st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("function", [uniform, gaussian, embedding, orthogonal])
@given(seed=seeds, n_out=sizes, n_in=sizes, half=st.integers(1, 4))
def test_these_initialisations_start_as_a_no_op_in_both_libraries(function, seed, n_out, n_in, half):
    W = np.zeros((n_out, n_in))
    for weight, rng in ((W, np.random.default_rng(seed)), (torch.from_numpy(W), torch.Generator().manual_seed(seed))):
        A, B, residual, _ = function(weight, 2 * half, 1.0, rng)
        assert A.shape == (2 * half, n_in)
        assert B.shape == (n_out, 2 * half)
        assert residual is None
        # QR leaves the rows behind A and B orthogonal to 8 r^2 roundings; the others have a factor of zeros
        terms = 8 * (2 * half) ** 2 if function is orthogonal else 0
        close(B @ A, 0 * (B @ A), terms, size=np.outer((B**2).sum(1) ** 0.5, (A**2).sum(0) ** 0.5))


@pytest.mark.parametrize("draw", [draw_normal, draw_uniform])
def test_a_seed_fixes_the_draw(draw) -> None:
    def in_torch(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    for like, seeded in ((np.zeros(1), np.random.default_rng), (torch.zeros(1), in_torch)):
        first, again, other = (draw((3, 4), 1.0, like, seeded(seed)) for seed in (1, 1, 2))
        assert (first == again).all() and (first != other).all()
        assert (draw((3, 4), 1.0, like) != first).all()  # without a generator: another draw


@pytest.mark.parametrize("draw", [draw_normal, draw_uniform])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_random_numbers_are_drawn_on_the_cpu_whatever_the_device(draw, device: str) -> None:
    """A weight that is on no device of this machine: the draws look at its device and its dtype alone."""

    class Elsewhere(torch.Tensor):
        device = property(lambda self: torch.device(device))

    assert draw((2, 3), 1.0, torch.zeros(2).as_subclass(Elsewhere)).device.type == "cpu"
    assert draw((2, 3), 1.0, torch.zeros(2, device="meta")).is_meta  # which has no numbers to start from


def assert_uniform(x: np.ndarray, bound: float) -> None:
    """U(-bound, bound): within 6 standard deviations of each estimate, and the bound is reached, not crossed."""
    n = x.size
    assert abs(x).max() <= bound * (1 + 2**-23)
    assert abs(x).max() >= bound * (1 - 40 / n)  # else an event of probability exp(-40)
    assert abs(x.mean()) < 6 * bound / math.sqrt(3 * n)
    assert abs(x.var() - bound**2 / 3) < 6 * bound**2 * math.sqrt((1 / 5 - 1 / 9) / n)


def assert_normal(x: np.ndarray, std: float) -> None:
    n = x.size
    assert abs(x.mean()) < 6 * std / math.sqrt(n)
    assert abs(x.var() - std**2) < 6 * std**2 * math.sqrt(2 / n)
    assert scipy.stats.kstest(x / std, "norm").pvalue > FALSE_ALARM


def test_false_draws_both_factors() -> None:
    """I4. The suite has the laws of True and of "gaussian"."""
    rng, W = np.random.default_rng(0), np.zeros((300, 400))
    A, B, *_ = unzeroed(W, 8, rng=rng)
    assert_uniform(A, 1 / math.sqrt(400))
    assert_uniform(B, 1 / math.sqrt(8))
    for factor in embedding_unzeroed(W, 8, rng=rng)[:2]:
        assert_normal(factor.ravel(), 1)


def test_numpy_and_torch_draw_from_the_same_laws() -> None:
    """One function for both libraries; two-sample Kolmogorov-Smirnov of every factor."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for value in (True, False, "gaussian", "orthogonal"):
        for method in METHODS[value].kinds.values():
            in_numpy = method(np.zeros((30, 40)), 8, 1.0, rng=rng)
            in_torch = method(torch.zeros(30, 40, dtype=torch.float64), 8, 1.0, rng=generator)
            for a, b in zip(in_numpy[:2], in_torch[:2], strict=True):
                assert a.shape == tuple(b.shape) and isinstance(a, np.ndarray) and isinstance(b, Tensor)
                assert a.dtype == np.float64 and b.dtype == torch.float64
                assert scipy.stats.ks_2samp(a.ravel(), b.numpy().ravel()).pvalue > FALSE_ALARM


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_draws_are_in_the_dtype_of_the_weight_and_at_least_in_float32(dtype: torch.dtype) -> None:
    A, B, *_ = unzeroed(torch.zeros(3, 4, dtype=dtype), 2)
    assert A.dtype == B.dtype == torch.promote_types(dtype, torch.float32)


RANDOM = (True, False, "gaussian", "orthogonal")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random_inits() -> list[Any]:
    """Every function behind the random values of `init_lora_weights`, once."""
    return sorted({f for value in RANDOM for f in inits.METHODS[value].kinds.values()}, key=lambda f: f.__name__)


@pytest.mark.parametrize("method", random_inits(), ids=lambda method: method.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_numbers_have_the_digits_of_the_weights_dtype(dtype: torch.dtype, method: Any) -> None:
    """T1: float64 draws for a float64 weight, float32 draws for any other: a half precision is rounded afterwards."""
    made = method(torch.zeros(30, 40, dtype=dtype), 8, 1.0, rng=torch.Generator().manual_seed(0))
    drawn_in, fewer = (torch.float64, torch.float32) if dtype is torch.float64 else (torch.float32, torch.float16)
    for x in (made.A, made.B):
        assert x.dtype is drawn_in
        random = x[x != 0]
        # 13 bits of float32 and 29 of float64 are lost: of 320 numbers or more hardly one has only zeros there
        assert (random.to(fewer).to(drawn_in) != random).sum() >= 0.9 * len(random)
    if dtype is not torch.float64:
        other = method(torch.zeros(30, 40), 8, 1.0, rng=torch.Generator().manual_seed(0))
        assert torch.equal(made.A, other.A) and torch.equal(made.B, other.B)


@pytest.mark.parametrize("init", RANDOM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_adapters_have_the_dtype_of_the_base(dtype: torch.dtype, init: Any) -> None:
    """T1, without the upcast of half precisions."""
    net = nn.Sequential(OrderedDict(m=nn.Linear(40, 30, dtype=dtype)))
    config = LoraConfig(r=8, target_modules=["m"], init_lora_weights=init)
    model = get_peft_model(net, config, autocast_adapter_dtype=False)
    factors = [p for p in model.parameters() if p.requires_grad]
    assert len(factors) == 2
    assert {p.dtype for p in factors} == {dtype}
    if dtype is torch.float64:
        random = torch.cat([p[p != 0] for p in factors])
        assert (random.float().double() != random).sum() >= 0.9 * len(random)
