"""The initialisations that draw, on NumPy arrays and on torch tensors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ref.core.inits import draw_normal, draw_uniform, embedding, gaussian, uniform, unzeroed
from lora_ref.init.orthogonal import orthogonal
from spec_tests import close

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


def test_a_seed_fixes_the_draw():
    W = torch.zeros(3, 4)
    first, again = (uniform(W, 2, 1.0, torch.Generator().manual_seed(1)).A for _ in range(2))
    assert torch.equal(first, again)


def test_unzeroed_draws_b_up_to_one_over_the_root_of_r() -> None:
    A, B, *_ = unzeroed(np.zeros((4000, 25)), r=4, rng=np.random.default_rng(0))
    assert 0.49 < abs(B).max() <= 0.5
    assert 0.19 < abs(A).max() <= 0.2


@pytest.mark.parametrize("draw", [draw_normal, draw_uniform])
@pytest.mark.parametrize("device, drawn_on", [("meta", "meta"), ("cpu", "cpu"), ("cuda", "cpu"), ("mps", "cpu")])
def test_random_numbers_are_drawn_on_the_cpu_whatever_the_device(draw, device: str, drawn_on: str) -> None:
    """A weight that is on no device of this machine: the draws look at its device and its dtype alone."""

    class Elsewhere(torch.Tensor):
        device = property(lambda self: torch.device(device))

    assert draw((2, 3), 1.0, torch.zeros(2).as_subclass(Elsewhere)).device.type == drawn_on
