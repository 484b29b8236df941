"""merge_and_unload writes into the weights' own memory: what it refuses and leaves alone, what an interrupt does."""

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Conv1D, Experts, randomise
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lora_ref import LoraConfig, PeftModel, get_peft_model
from lora_ref.core.layer import LoraLayer
from lora_ref.fast import merging as merge
from spec_tests import agree, close
from spec_tests.rounding import unit

WIDE = 256  # rows of 512 numbers: several blocks in half precision


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(512, WIDE),
    "conv1d": lambda: Conv1D(WIDE, 512),
    "embedding": lambda: nn.Embedding(512, WIDE),
    "conv": lambda: nn.Conv2d(64, WIDE, (2, 4)),
    "experts": lambda: Experts(3, WIDE, 512),
}


def adapted(net: nn.Module, *targets: str, r: int = 4, **options: Any) -> PeftModel:
    parameters = [t for t in targets if "." in t] or None
    config = LoraConfig(
        r=r, target_modules=[t for t in targets if "." not in t], target_parameters=parameters, **options
    )
    return randomise(get_peft_model(net.eval(), config), 1 / 8)


def layers(n: int = 4) -> nn.Sequential:
    """In float64, so that `agree` compares."""
    return nn.Sequential(*[nn.Linear(8, 8) for _ in range(n)]).double()


def bits(net: nn.Module) -> dict[str, bytes]:
    return {
        n.replace("base_layer.", ""): p.detach().numpy().tobytes() for n, p in net.named_parameters() if "lora" not in n
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BASES)
def test_the_sum_is_in_the_weights_own_memory_and_rounded_once(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"base": BASES[kind]()}).to(dtype)
    weight = next(p for p in net["base"].parameters() if p.ndim > 1)
    before, memory = weight.detach().clone(), weight.data_ptr()
    model = adapted(net, "base.stack" if kind == "experts" else "base")
    (layer,) = model.lora_layers().values()
    A, B = (factor.detach().double() for factor in layer.factors("default"))
    s, r = layer.scaling["default"], layer.r["default"]
    exact = before.double() + layer.stored(s * (B @ A))
    size = before.double().abs() + layer.stored(s * (B.abs() @ A.abs()))
    assert model.merge_and_unload() is net
    assert next(p for p in net["base"].parameters() if p.ndim > 1) is weight
    assert weight.data_ptr() == memory
    # the r products, the scaling and the sum are rounded in float32 at least, and only the result to the dtype
    sums = (r + 2) * unit(torch.promote_types(dtype, torch.float32)) / unit(dtype)
    close(weight, exact, terms=1, size=exact.abs() / 2 + (1 + unit(dtype)) * sums * size, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [128, 130, 1024])
def test_it_takes_less_memory_than_one_update(dtype: torch.dtype, width: int) -> None:
    net = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)]).to(dtype)
    model = adapted(net, "0", "1", "2")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.merge_and_unload()
    held = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 0 < most < net[0].weight.nbytes


def test_what_is_not_finite_is_refused_before_the_first_weight_is_written() -> None:
    net = layers()
    model = adapted(net, "0", "1", "2", "3")
    with torch.no_grad():
        model.lora_layers()["3"].factors("default")[0][0, 0] = torch.nan
    before = bits(net)
    with pytest.raises(ValueError, match=r"^3: merging default gives weights that are not finite; nothing was merged"):
        model.merge_and_unload()
    assert bits(net) == before
    assert all(isinstance(module, LoraLayer) and not module.merged for module in net)


def test_what_trains_is_as_before_when_merging_a_named_adapter_is_refused() -> None:
    """To merge another adapter than the active one it is made the active one, and trains."""
    model = adapted(layers(2), "0", "1")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0", "1"]))
    with torch.no_grad():
        model.lora_layers()["1"].factors("b")[0].fill_(torch.nan)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert len(set(before.values())) == 2
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload(adapter_names="b")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.active_adapters == ["default"]


def test_a_tied_weight_keeps_its_values_elsewhere() -> None:
    net = layers(3)
    net[1].weight = net[0].weight
    before = net[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="tied"):
        model = adapted(net, "1")
    delta = model.lora_layers()["1"].delta("default")
    model.merge_and_unload()
    assert torch.equal(net[0].weight, before)
    agree(net[1].weight, before + delta)


def test_a_weight_that_lies_in_anothers_memory_leaves_that_alone() -> None:
    """Views of one tensor, of which the other is not even a parameter; and one number that stands for all."""
    net, memory = layers(2), torch.randn(12, 8).double()
    net[0].weight = nn.Parameter(memory[:8])
    net[1].weight = nn.Parameter(torch.ones(1, 1).double().expand(8, 8))
    before = memory.clone()
    model = adapted(net, "0", "1")
    deltas = [layer.delta("default") for layer in model.lora_layers().values()]
    model.merge_and_unload()
    assert torch.equal(memory, before)
    agree(net[0].weight, before[:8] + deltas[0])
    agree(net[1].weight, 1 + deltas[1])


def test_weights_made_in_inference_mode_and_channels_last() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 4)).double()
        net = net.to(memory_format=torch.channels_last)
    weights = [net[0].weight.clone(), net[2].weight.clone()]
    model = adapted(net, "0", "2")
    deltas = [layer.delta("default") for layer in model.lora_layers().values()]
    model.merge_and_unload()
    for weight, before, delta in zip((net[0].weight, net[2].weight), weights, deltas, strict=True):
        agree(weight, before + delta)
    net = nn.Sequential(nn.Conv2d(3, 4, 3)).double().to(memory_format=torch.channels_last)
    before, model = net[0].weight.detach().clone(), adapted(net, "0")
    delta = model.lora_layers()["0"].delta("default")
    model.merge_and_unload()
    agree(net[0].weight, before + delta)


def test_an_interrupt_takes_effect_when_all_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    net = layers()
    model = adapted(net, "0", "1", "2", "3")
    x, handler, add = torch.randn(3, 8).double(), signal.getsignal(signal.SIGINT), merge.add
    y = model(x)

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        add(*args)

    monkeypatch.setattr(merge, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.merge_and_unload()
    assert all(type(module) is nn.Linear for module in net)
    agree(net(x), y)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_sum_that_fails_all_the_same_is_undone_to_rounding(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = layers()
    model = adapted(net, "0", "1", "2", "3")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, calls, add = torch.randn(3, 8).double(), [], merge.add
    y = model(x)

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise RuntimeError("the device is gone")
        add(*args, **kwargs)

    monkeypatch.setattr(merge, "add", failing)
    with pytest.raises(RuntimeError, match="the device is gone"):
        model.merge_and_unload()
    assert len(calls) == 2 * call - 1
    assert all(isinstance(module, LoraLayer) and not module.merged for module in net)
    agree(dict(net.named_parameters()), before)
    agree(model(x), y)
    monkeypatch.undo()
    agree(model.merge_and_unload()(x), y)


@given(
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.floats(-1, 1),
    st.floats(-1, 1),
    st.integers(0, 2**32),
)
def test_the_bound_is_a_proof(dtype: torch.dtype, w: float, d: float, seed: int) -> None:
    """Where it says that a sum is finite, it is; and far from the largest number it says so."""
    generator = torch.Generator().manual_seed(seed)
    top = torch.finfo(dtype).max
    wide = torch.promote_types(dtype, torch.float32)
    W = (torch.rand(3, 4, generator=generator, dtype=torch.float64) * w * top).to(dtype)
    A, B = torch.rand(2, 4, generator=generator, dtype=wide), torch.rand(3, 2, generator=generator, dtype=wide)
    B = B * (d * top)
    total = (W.to(wide) + B @ A).to(dtype)
    sure = merge.surely_finite(W, [(A, B, 1.0)])
    assert torch.isfinite(total).all() or not sure
    far = top**0.5 / 10  # from where squares overflow
    squared = dtype in (torch.float32, torch.bfloat16)
    assert sure or abs(w) * top > (far if squared else top / 2) or abs(d) * top > far


def test_factors_whose_squares_vanish_are_not_taken_for_zero() -> None:
    """A = 1e-30 and B = 1e36: the squares of A are zero in float32, and B A = 1e6 is beyond float16."""
    net = nn.Sequential(nn.Linear(2, 2)).half()
    model = adapted(net, "0", r=1)
    A, B = model.lora_layers()["0"].factors("default")
    A.data.fill_(1e-30), B.data.fill_(1e36)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_and_unload()


@pytest.mark.parametrize("merging", ["merge_adapter", "merge_and_unload"])
def test_a_scaling_beyond_the_dtype_is_refused(merging: str) -> None:
    model = adapted(nn.Sequential(nn.Linear(2, 2)), "0", r=1)
    layer = model.lora_layers()["0"]
    before, layer.scaling["default"] = layer.base_weight.clone(), 1e300
    with pytest.raises(ValueError, match=r"the scaling is 1e\+300: numbers up to 3.4e\+38 allow 1.7e\+38 at most"):
        getattr(model, merging)()
    assert torch.equal(layer.base_weight, before) and not layer.merged


@pytest.mark.parametrize("merging", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize(("a", "b", "s"), [(0.0, 3e38, 10.0), (float("nan"), 1.0, 0.0), (float("nan"), 1.0, 5e-324)])
def test_a_product_that_is_hidden_by_zero_is_not_taken_for_finite(merging: str, a: float, b: float, s: float) -> None:
    """s B overflows although A is 0; s is 0, also when it is rounded, although A is NaN."""
    model = adapted(nn.Sequential(nn.Linear(2, 2)), "0", r=1)
    layer = model.lora_layers()["0"]
    for factor, value in zip(layer.factors("default"), (a, b), strict=True):
        factor.data.fill_(value)
    before, layer.scaling["default"] = layer.base_weight.clone(), s
    with pytest.raises(ValueError, match="not finite"):
        getattr(model, merging)()
    assert torch.equal(layer.base_weight, before) and not layer.merged


def test_merging_for_good_holds_no_copies_of_the_factors() -> None:
    """Of a model with many small layers these would be more than the one update that is allowed."""
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "0", "1", r=4)
    for layer in model.lora_layers().values():
        for (A, B, _), (mine_A, mine_B) in zip(
            merge.updates_of(layer, ["default"], torch.float32), [layer.factors("default")], strict=True
        ):
            assert A.data_ptr() == mine_A.data_ptr() and B.data_ptr() == mine_B.data_ptr()


def test_a_start_is_merged_with_one_rounding_as_core_does() -> None:
    """s B A - D0 is computed first, so it is not summed in the weight's memory. Before training it is 0."""
    for dtype in (torch.float64, torch.bfloat16):
        model = adapted(nn.Sequential(nn.Linear(6, 5)).to(dtype), "0", r=2, init_lora_weights="pissa")
        layer, W = model.lora_layers()["0"], model.lora_layers()["0"].base_weight.detach().clone()
        with torch.no_grad():
            want = layer.merged_weight(["default"])
            layer.lora_A["default"].weight.copy_(layer.lora_initial["default"].A)
            layer.lora_B["default"].weight.copy_(layer.lora_initial["default"].B)
            assert torch.equal(layer.merged_weight(["default"]), W)
        assert not torch.equal(want, W)
        assert torch.equal(model.merge_and_unload()[0].weight, W)


def test_it_works_in_a_thread_where_signals_cannot_be_put_off() -> None:
    with ThreadPoolExecutor() as pool:
        merged = pool.submit(adapted(nn.Sequential(nn.Linear(2, 2)), "0").merge_and_unload).result()
    assert type(merged[0]) is nn.Linear


def test_a_sum_just_below_the_largest_number_is_accepted() -> None:
    net = nn.Sequential(nn.Linear(2, 2)).half()
    with torch.no_grad():
        net[0].weight.fill_(65000.0)
    model = adapted(net, "0", r=1)
    assert not merge.surely_finite(
        net[0].base_layer.weight, merge.updates_of(model.lora_layers()["0"], ["default"], torch.float32)
    )
    model.merge_and_unload()
    assert torch.isfinite(net[0].weight).all()
