"""The sum in place: what it computes, where, and when the rows are summed as a batch."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lora_ref import LoraConfig, get_peft_model
from lora_ref.fast.sums import add_in_place
from spec_tests import close


class Calls(TorchFunctionMode):
    """The functions of torch that are called, with the shape of their first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func.__name__, tuple(args[0].shape)))
        return func(*args, **(kwargs or {}))


@given(
    n=st.integers(1, 50),
    r=st.integers(1, 16),
    m=st.sampled_from([1, 3, 1000, 1024, 2048]),
    s=st.sampled_from([1.0, -0.5, 0.0, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    turned=st.tuples(st.booleans(), st.booleans()),
    wider=st.sampled_from([0, 1, 1024]),
)
def test_the_sum_and_nothing_else(
    n: int, r: int, m: int, s: float, dtype: torch.dtype, turned: tuple[bool, bool], wider: int
) -> None:
    """Any number of rows, any layout of the factors, a part of a larger memory: the rest of it stays as it was."""
    memory = torch.randn(n + 2, m + wider, dtype=dtype)
    before, total = memory.clone(), memory[1:-1, :m]
    B, A = (2 * torch.rand(shape, dtype=dtype) - 1 for shape in ((r, n), (m, r)))
    B, A = B.T if turned[0] else B.T.contiguous(), A.T if turned[1] else A.T.contiguous()
    part = before[1:-1, :m].double()
    want = part + s * (B.double() @ A.double())
    assert add_in_place(total, B, A, s) is total
    # r products, the scaling, the sum
    close(total, want, terms=r + 2, size=part.abs() + abs(s) * (B.double().abs() @ A.double().abs()), dtype=dtype)
    memory[1:-1, :m] = before[1:-1, :m]
    assert torch.equal(memory, before)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_wider_factors_are_not_rounded_and_the_sum_is_once(narrow: torch.dtype) -> None:
    """1 + 2^-9 - 1 in bfloat16 (2^-12 in float16): lost where the product, or a factor, is rounded before the sum."""
    tiny = 2.0 ** {torch.bfloat16: -9, torch.float16: -12}[narrow]
    total = torch.tensor([[-1.0, 2.0]], dtype=narrow)
    assert add_in_place(total, torch.tensor([[1 + tiny]]), torch.tensor([[1.0, 0.0]])) is total
    assert total.dtype == narrow and total.tolist() == [[tiny, 2.0]]
    wide = torch.tensor([[-1.0, 2.0]], dtype=torch.float64)
    assert add_in_place(wide, torch.tensor([[1 + tiny]]), torch.tensor([[1.0, 0.0]])) is wide
    assert wide.tolist() == [[tiny, 2.0]]


@pytest.mark.parametrize(
    ("n", "r", "m", "dtype", "batches"),
    [
        (16, 12, 1024, torch.float32, 1),
        (47, 1, 2048, torch.float32, 2),
        (15, 8, 1024, torch.float32, 0),
        (16, 13, 1024, torch.float32, 0),
        (16, 8, 1000, torch.float32, 0),
        (16, 8, 1024, torch.float64, 0),
        (16, 8, 1024, torch.bfloat16, 0),
    ],
)
def test_which_sums_are_done_in_batches(n: int, r: int, m: int, dtype: torch.dtype, batches: int) -> None:
    total, B, A = (torch.ones(shape, dtype=dtype) for shape in ((n, m), (n, r), (r, m)))
    with Calls() as calls:
        add_in_place(total, B, A)
    sums = [call for call in calls.seen if call[0] in ("baddbmm_", "addmm_")]
    assert sums == [("baddbmm_", (batches, 16, m))] * bool(batches) + [("addmm_", (n - 16 * batches, m))]


@pytest.mark.parametrize("r", [1, 8, 16])
def test_rows_of_4096_bytes_in_a_layer(r: int) -> None:
    """Value, gradients and merged weight of a layer 1024 wide, beside the formula in float64.

    All are whole numbers from -2 to 2. No sum reaches 2^24, so each is exact in float32, in any order.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1024, 1024))
    model = get_peft_model(net, LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"]))
    A, B = model.lora_layers()["0"].factors("default")
    x, g = torch.empty(37, 1024, requires_grad=True), torch.empty(37, 1024)
    for tensor in (net[0].base_layer.weight, net[0].base_layer.bias, A, B, x, g):
        tensor.data.copy_(torch.randint(-2, 3, tensor.shape))
    W, b = net[0].base_layer.weight.detach().double(), net[0].base_layer.bias.detach().double()
    y = model(x)
    y.backward(g)

    def formula() -> list[Tensor]:
        x_, A_, B_ = (t.detach().double().requires_grad_() for t in (x, A, B))
        y_ = x_ @ W.T + b + 2 * (x_ @ A_.T) @ B_.T
        y_.backward(g.double())
        return [y_.detach(), *(t.grad for t in (x_, A_, B_) if t.grad is not None)]

    for ours, exact in zip([y, x.grad, A.grad, B.grad], formula(), strict=True):
        assert ours is not None and exact.abs().max() < 2**24
        assert torch.equal(ours.double(), exact)
    want = W + 2 * B.detach().double() @ A.detach().double()
    assert torch.equal(model.merge_and_unload()[0].weight.double(), want)
