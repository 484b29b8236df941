"""The fast path of a linear layer against the formula of `layers.Linear`, which it must not differ from."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Conv1D, adapt
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.utils import prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lora_ref import LoraConfig
from lora_ref.fast import linear as fused
from spec_tests import agree, close
from spec_tests.rounding import UNIT, unit


def layer_of(n_in: int = 6, n_out: int = 5, adapters: int = 1, conv1d: bool = False, **options: Any) -> Any:
    """An adapted layer in float64 with random factors, `adapters` of them active."""
    base = Conv1D(n_out, n_in) if conv1d else nn.Linear(n_in, n_out)
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False} | options
    model, layer = adapt(base.double(), **options)
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", LoraConfig(target_modules=["m"], fan_in_fan_out=conv1d, **options | {"r": 2 + i}))
    model.set_adapter(["default", *(f"a{i}" for i in range(1, adapters))])
    return layer.train()


def results(
    layer: Any, x: Tensor, how: Callable[[Any, Tensor], Tensor] = lambda f, x: f(x), absolute: bool = False
) -> dict[str, Tensor]:
    """The output and all gradients, from a loss that weighs each output differently."""
    x = x.detach().requires_grad_(x.requires_grad)
    y = how(layer, x)
    layer.zero_grad(set_to_none=True)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    (y * (weights.abs() if absolute else weights)).sum().backward()
    found = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **found} | ({"x": x.grad} if x.grad is not None else {})


def both(layer: Any, x: Tensor, how: Callable[[Any, Tensor], Tensor] = lambda f, x: f(x)) -> list[dict[str, Tensor]]:
    """`results` of the fast path and of the formula, with the same random numbers; says that the first was taken."""
    found, calls, total = [], [], fused.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "forward", lambda *args: calls.append(1) or total(*args))
        torch.manual_seed(1)
        found.append(results(layer, x, how))
        assert calls, "the fast path was not taken"
        patch.setattr(fused, "applies", lambda x: False)
        torch.manual_seed(1)
        calls.clear()
        found.append(results(layer, x, how))
        assert not calls
    return found


def sizes(layer: Any, x: Tensor) -> dict[str, Tensor]:
    """What is summed in each of `results`: the same in float64 on absolute values, as if dropout kept everything."""
    plain = copy.deepcopy(layer).double().eval()
    for name, s in plain.scaling.items():
        p = layer.lora_dropout[name].p if layer.training and name in layer.lora_dropout else 0.0
        plain.scaling[name] = abs(s) / (1 - p)
    for parameter in plain.parameters():
        parameter.data.abs_()
    return results(plain, x.detach().double().abs().requires_grad_(x.requires_grad), absolute=True)


def assert_within(
    one: dict[str, Tensor], other: dict[str, Tensor], layer: Any, x: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Both are `results` of this layer and input: their sums differ by roundings, of `dtype` or of their own."""
    what_is_summed = sizes(layer, x)
    assert one.keys() == other.keys() == what_is_summed.keys()
    n_out, n_in = layer.lora_B["default"].out_features, layer.lora_A["default"].in_features
    ranks, tokens = sum(layer.r[name] for name in layer.active_adapters), x.numel() // n_in
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        longest = {
            "y": n_in + ranks, "x": n_out + ranks, "lora_A": n_out + tokens, "lora_B": n_in + tokens
        }.get(name.partition(".")[0], tokens)  # fmt: skip
        # the sums are float32's at least; one rounding each for the casts of x, W, A and B, the bias, the scaling,
        # dropout, and the result; an adapter's sum is rounded on its own
        u = unit(dtype or value)
        terms = longest * min(1, UNIT["float32"] / u) + len(layer.active_adapters) + 8
        close(value, other[name], terms, what_is_summed[name], dtype, what=name)


def assert_alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Both in float64, whatever was computed."""
    assert {name: (x.dtype, x.shape) for name, x in one.items()} == {n: (x.dtype, x.shape) for n, x in other.items()}
    agree(one, other)


# -- value and gradient ----------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from([(3,), (1, 1), (4, 3), (2, 3, 4), (0,)]),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    r=st.integers(1, 12),
    alpha=st.sampled_from([0.5, 1, 7, -2, 0]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    narrow=st.booleans(),
    adapters=st.integers(1, 3),
    conv1d=st.booleans(),
    trains=st.tuples(st.booleans(), st.booleans()),
)
def test_both_paths_agree(
    shape: tuple, sizes: tuple, r: int, alpha: float, dtype: torch.dtype, narrow: bool, adapters: int, conv1d: bool,
    trains: tuple,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    base = (Conv1D(sizes[1], sizes[0]) if conv1d else nn.Linear(*sizes)).to(dtype)
    model, layer = adapt(base, r=r, lora_alpha=abs(alpha) or 1, fan_in_fan_out=conv1d)
    for i in range(1, adapters):
        model.add_adapter(f"a{i}", model.peft_config["default"])
    if narrow:  # as with autocast_adapter_dtype=False
        layer.to(dtype)
    model.set_adapter(["default", *(f"a{i}" for i in range(1, adapters))])
    layer.scaling["default"] *= math.copysign(1, alpha) if alpha else 0
    layer.base_weight.requires_grad_(trains[0])
    x = torch.randn(*shape, sizes[0], dtype=dtype, requires_grad=trains[1])
    assert_within(*both(layer, x), layer, x)


@pytest.mark.parametrize("which", ["transposed", "expanded", "a slice"])
def test_inputs_and_gradients_of_any_layout(which: str) -> None:
    layer = layer_of()
    x = {
        "transposed": torch.randn(6, 4, 3).double().mT.transpose(0, 1).transpose(1, 2),
        "expanded": torch.randn(1, 6).double().expand(4, 6),
        "a slice": torch.randn(4, 9).double()[:, 2:8],
    }[which]
    x = x if x.shape[-1] == 6 else x.transpose(-1, -2)
    assert_alike(*both(layer, x.detach().requires_grad_()))

    def summed(f: Any, x: Tensor) -> Tensor:  # the gradient that comes in is one number, expanded
        return f(x).sum().reshape(1)

    assert_alike(*both(layer, x.detach().requires_grad_(), summed))


@pytest.mark.parametrize("adapters", [1, 2])
def test_gradcheck_and_second_derivatives(adapters: int) -> None:
    layer = layer_of(3, 4, adapters)
    factors = [f.detach().clone().requires_grad_() for n in layer.r for f in layer.factors(n)]
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    base = layer.base_layer.requires_grad_()

    def call(x: Tensor, W: Tensor, b: Tensor, *factors: Tensor) -> Tensor:
        branches = [fused.Branch(A, B, 0.7 + i, 0.0) for i, (A, B) in enumerate(zip(*[iter(factors)] * 2, strict=True))]
        return torch.tanh(fused.add_branch(base, W, b, x, fused.joined(branches) if adapters > 1 else branches[0]))

    assert torch.autograd.gradcheck(call, (x, base.weight, base.bias, *factors))
    assert torch.autograd.gradgradcheck(call, (x, base.weight, base.bias, *factors))


def test_a_gradient_penalty() -> None:
    """Double backward through the layer, dropout included, as by the formula with the same mask."""
    layer = layer_of(lora_dropout=0.25)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    seen = []
    for call in (layer, partial(by_mask, layer)):
        torch.manual_seed(2)
        (dx,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
        seen.append(torch.autograd.grad(dx.square().sum(), [x, *layer.factors("default")]))
    agree(*seen)


# -- dropout ---------------------------------------------------------------------------------------


def by_mask(layer: Any, x: Tensor) -> Tensor:
    """The formula with `fused.mask`."""
    masks = [fused.mask(x, layer.lora_dropout[name].p) for name in layer.active_adapters]
    y = layer.base_layer(x)
    for name, kept in zip(layer.active_adapters, masks, strict=True):
        A, B = layer.factors(name)
        dropped = x.to(A.dtype) * kept.view(x.shape) / (1 - layer.lora_dropout[name].p)
        y = y + layer.scaling[name] * (dropped @ A.T @ B.T)
    return y


@settings(deadline=None, max_examples=30)
@given(
    p=st.sampled_from([2**-16, 0.1, 0.25, 0.5]),
    shape=st.sampled_from([(3,), (2, 5), (1,)]),
    needs_x=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_dropout_in_value_and_gradient(p: float, shape: tuple, needs_x: bool, dtype: torch.dtype) -> None:
    layer = layer_of(lora_dropout=p)
    layer.base_layer.to(dtype)
    if dtype != torch.float64:
        layer.float().base_layer.to(dtype)
    x = torch.randn(*shape, 6, dtype=dtype, requires_grad=needs_x)
    torch.manual_seed(3)
    fast = results(layer, x)
    torch.manual_seed(3)
    formula = results(layer, x, lambda f, x: by_mask(f, x).to(x.dtype))
    assert_within(fast, formula, layer, x)


def test_the_mask_is_that_of_dropout() -> None:
    """Each element is dropped with probability p, each of the four in a word, independent of the others."""
    torch.manual_seed(0)
    x = torch.empty(1000, 1001)  # odd: the last word is not used up
    for p in (0.1, 0.5, 1 / 3):
        kept = fused.mask(x, p)
        assert kept.shape == x.shape and set(kept.unique().tolist()) == {0, 1}
        flat = kept.flatten()[: 4 * (kept.numel() // 4)].view(-1, 4).double()
        sigma = math.sqrt(p * (1 - p) / len(flat))
        assert (flat.mean(0) - (1 - p)).abs().max() < 5 * sigma
        correlation = torch.corrcoef(torch.cat([flat[1:], flat[:-1]], dim=1).T) - torch.eye(8)
        assert correlation.abs().max() < 5 / math.sqrt(len(flat))
    rare = fused.mask(torch.empty(2**11, 2**11), 2**-16)  # 64 of them expected
    assert abs((rare == 0).sum().item() - 64) < 5 * math.sqrt(64)
    torch.manual_seed(5)
    one = fused.mask(x, 0.1)
    torch.manual_seed(5)
    assert torch.equal(one, fused.mask(x, 0.1)) and not torch.equal(one, fused.mask(x, 0.1))


@pytest.mark.parametrize("p", [0.75, 1.0])
def test_much_dropout_is_left_to_torch(p: float) -> None:
    layer = layer_of(lora_dropout=p)
    assert layer.branch_tensors(torch.ones(1, 6, dtype=torch.float64)) is None
    layer.eval()
    assert layer.branch_tensors(torch.ones(1, 6, dtype=torch.float64)).p == 0


def test_several_adapters_are_one_but_not_where_each_has_a_mask() -> None:
    layer = layer_of(adapters=2, lora_dropout=0.25)
    layer.scaling["a1"] = -0.5
    assert layer.branch_tensors(torch.ones(1, 6, dtype=torch.float64)) is None
    A, B, s, p = layer.eval().branch_tensors(torch.ones(1, 6, dtype=torch.float64))
    assert (A.shape[0], s, p) == (2 + 3, 1.5, 0)
    agree(B, torch.cat([layer.factors("default")[1], -layer.factors("a1")[1] / 3], dim=1))
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert_alike(*both(layer, x))
    layer.scaling.update(default=0.0, a1=0.0)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("adapters", [2, 3])
def test_several_adapters_with_dropout(adapters: int) -> None:
    """By the formula, in value and gradient: every adapter's input has torch's next mask."""
    layer = layer_of(adapters=adapters, lora_dropout=0.25)

    def formula(layer: Any, x: Tensor) -> Tensor:
        y = layer.base_layer(x)
        for name in layer.active_adapters:
            A, B = layer.factors(name)
            y = y + layer.scaling[name] * (nn.functional.dropout(x, 0.25) @ A.T @ B.T)
        return y

    x, found = torch.randn(7, 6, dtype=torch.float64, requires_grad=True), []
    for call in (None, formula):
        torch.manual_seed(3)
        found.append(results(layer, x) if call is None else results(layer, x, call))
    assert_alike(found[0], found[1])


# -- what must not be noticed ----------------------------------------------------------------------


def test_nothing_that_others_hold_is_changed() -> None:
    layer = layer_of(lora_dropout=0.3)
    x, g = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 5, dtype=torch.float64)
    kept = x.detach().clone(), g.clone(), [p.detach().clone() for p in layer.parameters()]
    y = layer(x)
    y.backward(g)
    assert torch.equal(x, kept[0]) and torch.equal(g, kept[1])
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), kept[2], strict=True))


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_on_the_base_see_what_the_base_said(grad: bool) -> None:
    layer = layer_of()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    want = layer.base_layer(x.detach()).detach()
    seen: list[Tensor] = []
    layer.base_layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    layer.base_layer.register_full_backward_hook(lambda module, gx, gy: seen.append(gx[0]))
    with nullcontext() if grad else torch.no_grad():
        y = layer(x)
    assert torch.equal(seen[0], want) and not torch.equal(y, want)
    if grad:
        y.sum().backward()
        agree(seen[1], torch.ones(4, 5).double() @ layer.base_layer.weight)


EVERYWHERE: dict[str, Any] = {
    "forward": nn.modules.module.register_module_forward_hook,
    "forward_pre": nn.modules.module.register_module_forward_pre_hook,
    "backward": nn.modules.module.register_module_full_backward_hook,
    "backward_pre": nn.modules.module.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_a_hook_on_all_modules_sees_the_base(kind: str) -> None:
    layer = layer_of()
    seen: list[nn.Module] = []
    handle = EVERYWHERE[kind](lambda module, *values: seen.append(module))
    try:
        layer(torch.randn(4, 6, dtype=torch.float64, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert layer.base_layer in seen


@pytest.mark.parametrize("merged", ["default", "a1", "a2"])
def test_one_adapter_merged_and_others_active(merged: str) -> None:
    """The fast path adds the others, whichever of the three was merged."""
    x = torch.randn(4, 6, dtype=torch.float64)
    model, layer = adapt(nn.Linear(6, 5).double(), r=2, init_lora_weights=False)
    for name in ("a1", "a2"):
        model.add_adapter(name, LoraConfig(r=1, target_modules=["m"], init_lora_weights=False))
    model.set_adapter(["default", "a1", "a2"])
    want = layer(x)
    model.merge_adapter([merged])
    agree(layer(x), want)


class Tanh(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))  # kept for backward


class Through(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Deaf(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class Quantized(Tensor):
    pass


def offloaded(base: nn.Linear) -> None:
    """As accelerate does it: another forward for one object."""
    plain = base.forward
    base.forward = lambda x: torch.tanh(plain(x))  # type: ignore[method-assign]


def pruned(base: nn.Linear) -> None:
    prune.random_unstructured(base, "weight", 0.5)


def bias_in_a_buffer(base: nn.Linear) -> None:
    bias = base.bias.detach()
    del base.bias
    base.register_buffer("bias", bias)


def quantized(base: nn.Linear) -> None:
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Quantized), requires_grad=False)


@pytest.mark.parametrize("what", [Tanh, Through, Deaf, offloaded, pruned, bias_in_a_buffer, quantized])
def test_a_base_that_does_something_else(what: Any) -> None:
    """Another class, another forward, a hook, another weight: the formula, which asks the base itself."""
    changed = not isinstance(what, type)
    _, layer = adapt((nn.Linear if changed else what)(6, 6).double(), r=2, lora_alpha=3, init_lora_weights=False)
    if changed:
        what(layer.base_layer)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()

    def formula(layer: Any, x: Tensor) -> Tensor:
        A, B = layer.factors("default")
        return layer.base_layer(x) + 1.5 * (x @ A.T @ B.T)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "add_branch", lambda *args: pytest.fail("the fast path was taken"))
        assert_alike(results(layer, x), results(layer, x, formula))
    assert torch.equal(x, before)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_factors_that_are_computed_from_others(side: str) -> None:
    """Pruned or parametrised: what they are now counts, and the parameters behind them get the gradient."""
    layer = layer_of()
    prune.random_unstructured(getattr(layer, side)["default"], "weight", 0.5)
    x = torch.randn(4, 6, dtype=torch.float64)
    A, B = layer.factors("default")
    assert (A == 0).any() or (B == 0).any()
    agree(layer(x), layer.base_layer(x) + 1.5 * (x @ A.T @ B.T))
    layer(x).sum().backward()
    assert getattr(layer, side)["default"].weight_orig.grad is not None


def test_its_output_may_be_changed_in_place() -> None:
    """As that of a plain layer: by an activation, or a residual sum."""
    layer = layer_of(6, 6)
    for shape in ((6,), (4, 6), (2, 4, 6)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert_alike(*both(layer, x, lambda f, x: torch.relu_(f(x).add_(x))))


def test_no_gradient_is_computed_that_nobody_asks_for() -> None:
    """Where x needs none, the base does not compute one."""
    layer, seen = layer_of(), []
    layer.base_layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].requires_grad))
    for needed in (False, True):
        layer(torch.randn(4, 6, dtype=torch.float64, requires_grad=needed)).sum().backward()
    assert seen == [False, True]


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_what_is_kept_for_backward(dropout: float) -> None:
    """x, z and the factors; with dropout one byte an element of x."""
    layer = layer_of(lora_dropout=dropout).float()
    x = torch.randn(7, 6, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    for known in (x, *layer.parameters()):
        kept.pop(known.untyped_storage().data_ptr(), None)
    assert sorted(kept.values()) == [7 * 6] * bool(dropout) + [2 * 7 * 4]
    assert y.requires_grad


# -- under other machinery -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", [1, 2])
def test_autocast(dtype: torch.dtype, adapters: int) -> None:
    layer = layer_of(adapters=adapters).float()

    def call(f: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return f(x)

    x = torch.randn(4, 6, requires_grad=True)
    fast, formula = both(layer, x, call)
    assert fast["y"].dtype == dtype
    assert_within(fast, formula, layer, x, dtype)


def test_the_autocast_of_another_device_changes_nothing() -> None:
    layer = layer_of().float()
    x = torch.randn(4, 6)
    want = layer(x)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert torch.equal(layer(x), want)
    finally:
        torch.set_autocast_enabled("cuda", False)


def selective(f: Any, x: Tensor) -> Tensor:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if "mm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return checkpoint(f, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "selective"])
def test_checkpointing(how: str, dropout: float) -> None:
    """The same bits as without, masks included; a selective one gets the formula, which it can look into."""
    layer = layer_of(adapters=2, lora_dropout=dropout)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    call = selective if how == "selective" else partial(checkpoint, use_reentrant=how == "reentrant")
    torch.manual_seed(4)
    recomputed = results(layer, x, call)
    with pytest.MonkeyPatch.context() as patch:
        if how == "selective":
            patch.setattr(fused, "applies", lambda x: False)
        torch.manual_seed(4)
        plain = results(layer, x)
    assert plain.keys() == recomputed.keys() and all(torch.equal(plain[n], recomputed[n]) for n in plain)


def test_compiled_whole() -> None:
    torch._dynamo.reset()
    layer = layer_of(adapters=2)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_alike(results(layer, x), results(layer, x, lambda f, x: compiled(x)))


def an_export_looks_like_this() -> bool:
    """Old versions of torch say of every compilation that it exports. Then the compiler gets the formula."""
    torch._dynamo.reset()
    said = torch.compile(lambda x: x + 1 if torch.compiler.is_exporting() else x, backend="eager")
    return bool(said(torch.zeros(1)))


def operators(f: Callable[[Tensor], Tensor], x: Tensor, in_place: set[str]) -> Callable[[Tensor], Tensor]:
    """f compiled. `in_place` gets the names of the operators of lora_ref that the compiler sees."""

    def see(graph: Any, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            in_place.update(str(a) for a in (node.target, *node.args) if str(a).startswith("lora_ref."))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=aot_autograd(fw_compiler=see, bw_compiler=see))


@pytest.mark.parametrize("shape", [(6,), (0, 6), (4, 6), (2, 3, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_compiler_gets_sums_in_place(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer, seen = layer_of().to(dtype), set[str]()
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    compiled = operators(layer, x, seen)
    assert_within(results(layer, x), results(layer, x, lambda f, x: compiled(x)), layer, x)
    assert seen == (set() if an_export_looks_like_this() else {"lora_ref.add_product.default"})


@pytest.mark.parametrize(
    "what", ["hook", "Conv1D", "autocast", "D0", "p > 1/2", "another module", "mixed batch", "off"]
)
def test_a_compiler_gets_the_formula_where_the_layer_is_not_plain(what: str) -> None:
    options = {"p > 1/2": {"lora_dropout": 0.75}, "D0": {"init_lora_weights": "pissa"}}.get(what, {})
    layer, seen = layer_of(conv1d=what == "Conv1D", **options).eval(), set[str]()
    layer.train(what == "p > 1/2")
    if what == "hook":
        layer.lora_A["default"].register_forward_hook(lambda module, args, z: 2 * z)
    elif what == "another module":
        layer.lora_B["default"] = nn.Sequential(layer.lora_B["default"])
    elif what == "mixed batch":
        layer.adapter_names = ("default", "__base__", "default")
    elif what == "off":
        layer.enable_adapters(False)
    x = torch.randn(3, 6, dtype=torch.float64)

    def run(f: Callable[[Tensor], Tensor]) -> Tensor:
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16) if what == "autocast" else nullcontext():
            return f(x)

    got = run(operators(layer, x, seen))
    assert seen == set()
    if what != "p > 1/2":  # a compiler draws other masks
        agree(got, run(layer))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", ["vmap", "grad", "gradients by sample", "jvp", "hessian"])
def test_transforms_inside_of_a_compiled_function(transform: str, backend: str) -> None:
    layer = layer_of().eval()
    factors = {name: p.detach() for name, p in layer.named_parameters()}
    X = torch.randn(3, 2, 6, dtype=torch.float64)

    def cubes(factors: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, factors, (x,)).pow(3).sum()

    A = "lora_A.default.weight"
    of = {
        "vmap": lambda X: torch.func.vmap(partial(cubes, factors))(X),
        "grad": lambda X: torch.func.grad(cubes)(factors, X[0])[A],
        "gradients by sample": lambda X: torch.func.vmap(torch.func.grad(cubes), (None, 0))(factors, X)[A],
        "jvp": lambda X: torch.func.jvp(partial(cubes, factors), (X[0],), (X[1],))[1],
        "hessian": lambda X: torch.func.jacrev(torch.func.grad(partial(cubes, factors)))(X[0]),
    }[transform]
    torch._dynamo.reset()
    agree(torch.compile(of, backend=backend)(X), of(X))


def test_a_compiled_layer_has_no_second_derivative_and_says_so() -> None:
    if an_export_looks_like_this():
        pytest.skip("the compiler gets the formula, which has second derivatives")
    layer, x = layer_of(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    (first,) = torch.autograd.grad(torch.compile(layer, backend="eager")(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="grad"):
        torch.autograd.grad(first.sum(), x)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_has_torchs_operations_alone(strict: bool) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    exported = torch.export.export(layer := layer_of().eval(), (x,), strict=strict)
    graphs = [m.graph for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    operators = [str(n.target) for graph in graphs for n in graph.nodes if n.op == "call_function"]
    assert operators and all(name.startswith("aten.") for name in operators)
    agree(exported.module()(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_operator_is_what_it_says(dtype: torch.dtype) -> None:
    """torch's own checks: the schema names what is changed, nothing is returned, a fake call does as a real one."""
    total, B, A = (torch.randn(shape, dtype=dtype) for shape in ((3, 4), (3, 2), (2, 4)))
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.lora_ref.add_product, (total, B, A, 0.5), test_utils=tests)


def test_transforms_and_forward_mode() -> None:
    layer = layer_of()
    x = torch.randn(4, 6, dtype=torch.float64)
    want = layer(x).detach()
    agree(torch.func.vmap(layer)(x), want)
    jacobian = torch.func.jacrev(layer)(x[0])
    agree(jacobian, torch.func.jacfwd(layer)(x[0]))
    agree(jacobian, torch.autograd.functional.jacobian(layer, x[0]))
    params = {n: p.detach() for n, p in layer.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, params, x).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)  # a gradient for each sample
    whole = torch.func.grad(loss)(params, x)
    agree({n: each[n].sum(0) for n in params}, whole)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    agree(tangent, torch.ones_like(x) @ jacobian.T)


def test_traced_exported_and_copied() -> None:
    layer = layer_of().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    want = layer(x).detach()
    agree(torch.jit.trace(layer, x, check_trace=False)(x), want)
    agree(torch.export.export(layer, (x,)).module()(x), want)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    assert layer.to("meta")(x.to("meta")).shape == want.shape


def test_data_parallel_and_sharded() -> None:
    """DDP and FSDP2 in a group of one process: the same numbers, with DDP the same bits.

    FSDP's weights lie elsewhere in memory, and a BLAS may sum by where its numbers lie.
    """
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(0)
    plain = results(layer_of(adapters=2), x)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        parallel: list[Any] = [nn.parallel.DistributedDataParallel, partial(fully_shard, mesh=mesh)]
        for wrap in parallel:
            torch.manual_seed(0)
            wrapped = results(wrap(layer_of(adapters=2)), x)
            found = {n.removeprefix("module."): getattr(g, "_local_tensor", g) for n, g in wrapped.items()}
            assert_alike(found, plain)
            assert wrap is parallel[1] or all(torch.equal(plain[n], found[n]) for n in plain)
    finally:
        torch.distributed.destroy_process_group()


# -- a batch that mixes adapters -------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    names=st.lists(st.sampled_from(["default", "wide", "loud", "__base__"]), min_size=1, max_size=6),
    tokens=st.sampled_from([(), (1,), (3,), (2, 2)]),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    grad=st.booleans(),
)
def test_each_row_has_its_own_adapter(names: list[str], tokens: tuple, dtype: torch.dtype, grad: bool) -> None:
    torch.manual_seed(0)
    model, layer = adapt(nn.Linear(6, 5).to(dtype), r=2, lora_alpha=3, init_lora_weights=False)
    for name, r, alpha in (("wide", 4, 3), ("loud", 2, 9)):
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=["m"], init_lora_weights=False)
        model.add_adapter(name, config)
    model.eval()
    x = torch.randn(len(names), *tokens, 6, dtype=dtype)
    want = torch.empty(len(names), *tokens, 5, dtype=dtype)
    W, b, X = (t.detach().double().abs() for t in (layer.base_layer.weight, layer.base_layer.bias, x))
    size = X @ W.T + b
    for i, name in enumerate(names):
        if name == "__base__":
            want[i] = layer.base_layer(x[i : i + 1])[0]
        else:
            model.set_adapter(name)
            want[i] = layer(x[i : i + 1])[0].detach()
            A, B = (f.detach().double().abs() for f in layer.factors(name))
            size[i] += layer.scaling[name] * (X[i] @ A.T @ B.T)
    with nullcontext() if grad else torch.no_grad():
        got = model(x, adapter_names=names)
    assert got.dtype == dtype
    # 6 products, at most 4 more, the bias and the scaling, in float32 at least; three roundings to the dtype: W x, the
    # branch, the sum; and two of the cast factors
    close(got, want, terms=5 + (6 + 4 + 2) * min(1, UNIT["float32"] / unit(dtype)), size=size)


def test_mixed_rows_have_gradients() -> None:
    model, layer = adapt(nn.Linear(6, 5).double(), r=2, lora_alpha=3, init_lora_weights=False)
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    model.eval()(x, adapter_names=["default", "__base__", "default"]).square().sum().backward()
    mixed = [layer.lora_A["default"].weight.grad.clone(), x.grad.clone()]
    layer.zero_grad()
    x.grad = None
    (layer(x[[0, 2]]).square().sum() + layer.base_layer(x[1]).square().sum()).backward()
    agree(mixed, [layer.lora_A["default"].weight.grad, x.grad])


def test_it_applies_to_plain_tensors_outside_of_forward_mode_alone():
    class Other(torch.Tensor):
        pass

    x = torch.ones(2, 2)
    assert fused.applies(x) and fused.applies(torch.nn.Parameter(x))
    assert not fused.applies(x.as_subclass(Other))
    with torch.autograd.forward_ad.dual_level():
        assert not fused.applies(x)
