"""Numbers in every dtype, and what PyTorch does to models: autocast, compile, checkpointing, copies, meta tensors."""

import copy
import functools
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Conv1D, gpt2, stored
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ref import LoraConfig, PeftModel, get_peft_model
from spec_tests import agree, distance
from spec_tests.rounding import unit

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.c1d = nn.Embedding(11, 12), nn.Linear(12, 20), Conv1D(12, 20)
        self.conv = nn.Conv1d(12, 8, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.conv(self.c1d(torch.tanh(self.lin(self.emb(tokens)))).mT).mT


TOKENS = torch.arange(22).reshape(2, 11) % 11
TARGETS = ["emb", "lin", "c1d", "conv"]


def adapted(dtype: torch.dtype = torch.float32, autocast: bool = True, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 3, "target_modules": TARGETS, "init_lora_weights": False} | options
    config = LoraConfig(fan_in_fan_out=False, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        return get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=autocast)


def second(model: PeftModel, name: str = "second", r: int = 3) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out")
        model.add_adapter(name, LoraConfig(r=r, lora_alpha=-1, target_modules=TARGETS, init_lora_weights=False))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """The base weights."""
    return {name: layer.unmerged_weight.clone() for name, layer in model.lora_layers().items()}


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


# -- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_a_and_b(dtype: torch.dtype, autocast: bool) -> None:
    """T1: the base's; float32 for half precisions, unless told not to; rounded to the base's dtype at the start."""
    model = adapted(dtype, autocast)
    want = torch.float32 if autocast and dtype.itemsize < 4 else dtype
    factors = [p for layer in model.lora_layers().values() for p in stored(layer)]
    assert len(factors) == 8
    for p in factors:
        assert p.dtype == want
        assert torch.equal(p.to(dtype).to(want), p)  # already representable in the base's dtype
    assert model(TOKENS).dtype == dtype


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_is_near_the_exact_one(dtype: torch.dtype, autocast: bool) -> None:
    """The linear layer in any dtype against float64, within n u of the sum of absolute values."""
    torch.manual_seed(1)
    n_in, n_out, r = 48, 40, 4
    base = nn.Linear(n_in, n_out).to(dtype)
    model = get_peft_model(
        nn.Sequential(base), LoraConfig(r=r, lora_alpha=6, target_modules=["0"], init_lora_weights=False),
        autocast_adapter_dtype=autocast,
    )  # fmt: skip
    layer, x = model.lora_layers()["0"], torch.randn(7, n_in).to(dtype)
    W, b, X = base.weight.double(), base.bias.double(), x.double()
    A, B = (f.double() for f in layer.factors("default"))
    s = 6 / r
    want, u = X @ W.T + b + s * X @ A.T @ B.T, unit(dtype)
    scale = X.abs() @ W.abs().T + b.abs() + s * X.abs() @ A.abs().T @ B.abs().T
    # sums in the worst case in the dtype itself: n_in + r additions and a few products and roundings
    n = n_in + r + 6
    assert n * u < 1
    assert ((model(x).double() - want).abs() <= n * u / (1 - n * u) * scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_base_and_branch_are_added_before_rounding(dtype: torch.dtype) -> None:
    """T2: y = round(base_half + branch_float32), bit for bit. Integers: so that float32 does not round at all."""
    torch.manual_seed(0)
    base = nn.Linear(16, 16).to(dtype)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(base), config)
    A, B = model.lora_layers()["0"].factors("default")
    with torch.no_grad():
        for tensor, size in ((base.weight, 16), (base.bias, 16), (A, 2), (B, 2)):
            tensor.copy_(torch.randint(-size, size + 1, tensor.shape))
    x = torch.randint(-64, 65, (64, 16)).to(dtype)
    branch = x.float() @ A.T @ B.T
    assert torch.equal(model(x), (base(x).float() + branch).to(dtype))
    assert not torch.equal(model(x), base(x) + branch.to(dtype))  # rounding twice would show


def test_several_adapters_are_summed_before_rounding() -> None:
    """Two updates that cancel leave the base's output, exactly: nothing is rounded to bfloat16 between them.

    Integers: so that float32 does not round at all.
    """
    torch.manual_seed(0)
    base = nn.Linear(8, 8).bfloat16()
    model = get_peft_model(
        nn.Sequential(base), LoraConfig(r=1, lora_alpha=1, target_modules=["0"], init_lora_weights=False)
    )  # fmt: skip
    model.add_adapter("b", LoraConfig(r=1, lora_alpha=-1, target_modules=["0"], init_lora_weights=False))
    layer = model.lora_layers()["0"]
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(torch.randint(-16, 17, parameter.shape))
        for part in (layer.lora_A, layer.lora_B):
            part["default"].weight.copy_(torch.randint(-4, 5, part["default"].weight.shape))
            part["b"].weight.copy_(part["default"].weight)
    x = torch.randint(-64, 65, (32, 8)).bfloat16()
    model.set_adapter("b")
    one = model(x)
    model.set_adapter(["default", "b"])
    assert torch.equal(model(x), base(x))
    branch = base(x) - one
    assert not torch.equal(one + branch, base(x))  # rounding in between would show


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_inputs_of_a_half_model_are_the_users_error_as_without_lora(dtype: torch.dtype) -> None:
    base = nn.Linear(4, 4).to(dtype)
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(RuntimeError):
        base(torch.randn(2, 4))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4))


@pytest.mark.parametrize("merged", [False, True])
def test_autocast(merged: bool) -> None:
    """A float32 model under bfloat16 autocast: bfloat16 out, float32 gradients, and near the float32 output."""
    model = adapted()
    y = model(TOKENS)
    if merged:
        model.merge_adapter()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(TOKENS)
    assert half.dtype == torch.bfloat16
    assert (half.float() - y).norm() <= 8 * 4 * unit(torch.bfloat16) * y.norm()  # 4 layers, each a few roundings
    if not merged:
        half.float().square().sum().backward()
        for layer in model.lora_layers().values():
            assert layer.base_weight.grad is None
            for p in stored(layer):
                assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any()


# -- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_merge_is_rounded_once_and_undone_to_the_bit(dtype: torch.dtype) -> None:
    """T3: |merged - (W + D)| <= u |W + D|, plus what float32 (at least) costs in computing D."""
    model = adapted(dtype)
    second(model)
    before = bits(model)
    exact, slack = {}, {}
    for name, layer in model.lora_layers().items():
        D, size = 0, 0
        for adapter in ("default", "second"):
            A, B = (f.detach().double() for f in layer.factors(adapter))
            s = layer.scaling[adapter]
            D = D + layer.stored(s * B @ A)
            size = size + layer.stored(abs(s) * B.abs() @ A.abs())
        exact[name] = before[name].double() + D
        # r products and sums, the scaling, and one addition for each adapter
        slack[name] = (
            12 * unit(max(dtype, torch.float32, key=lambda d: d.itemsize)) * (size + before[name].double().abs())
        )
    model.merge_adapter(["default", "second"])
    for name, layer in model.lora_layers().items():
        got = layer.base_weight.detach()
        assert got.dtype == dtype
        tiny = torch.finfo(dtype).tiny * unit(dtype)  # below the normal numbers rounding is absolute
        bound = unit(dtype) * exact[name].abs() + (1 + unit(dtype)) * slack[name] + tiny
        assert ((got.double() - exact[name]).abs() <= bound).all(), name
    model.unmerge_adapter()
    assert_same_bits(bits(model), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merging_one_after_the_other_and_unmerging_is_exact(dtype: torch.dtype) -> None:
    model = adapted(dtype)
    names = ["default"]
    for i in range(4):
        names.append(f"a{i}")
        second(model, names[-1], r=1 + i)
    before = bits(model)
    for _ in range(3):
        for name in names:
            model.merge_adapter([name])
            model.merge_adapter([name])  # again: nothing
        assert model.lora_layers()["lin"].merged_adapters == names
        assert_same_bits(bits(model), before)
        with model.disable_adapter():
            now = {name: layer.base_weight.detach().clone() for name, layer in model.lora_layers().items()}
        assert_same_bits(now, before)
        model.unmerge_adapter()
        now = {name: layer.base_weight.detach().clone() for name, layer in model.lora_layers().items()}
        assert_same_bits(now, before)


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_moves_while_merged(dtype: torch.dtype, disabled: bool) -> None:
    """The weight put aside follows: unmerging gives the original, in the new dtype."""
    model = adapted(torch.float32)
    before = {name: w.to(dtype) for name, w in bits(model).items()}
    model.merge_adapter()
    if disabled:
        model.disable_adapter_layers()
    model.to(dtype)
    with model.disable_adapter():
        assert model(TOKENS).dtype == dtype
    model.enable_adapter_layers()
    assert model(TOKENS).dtype == dtype
    model.unmerge_adapter()
    assert_same_bits({n: layer.base_weight.detach() for n, layer in model.lora_layers().items()}, before)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", TARGETS)
def test_a_merge_that_is_not_finite_changes_nothing(value: float, where: str) -> None:
    model = adapted()
    before = bits(model)
    factor = stored(model.lora_layers()[where])[0]
    with torch.no_grad():
        factor.view(-1)[0] = value
    for merge in (model.merge_adapter, lambda: copy.deepcopy(model).merge_and_unload()):
        with pytest.raises(ValueError, match=rf"^{where}: merging default gives weights that are not finite"):
            merge()
    assert_same_bits(bits(model), before)
    assert not any(layer.merged for layer in model.lora_layers().values())


def test_an_overflow_of_half_precision_is_refused() -> None:
    """65504 is the largest float16: W + D fits into float32, but not into W."""
    base = nn.Linear(2, 2).half()
    model = get_peft_model(nn.Sequential(base), LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    layer = model.lora_layers()["0"]
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(300)
        layer.lora_B["default"].weight.fill_(300)
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter()
    assert not layer.merged


def test_training_leaves_the_base_weights_to_the_bit() -> None:
    model = adapted(bias="lora_only")
    before = bits(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = None
    for _ in range(10):
        loss = model(TOKENS).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 2
    assert_same_bits(bits(model), before)


# -- torch.compile ---------------------------------------------------------------------------------


@functools.cache
def why_nothing_compiles() -> str:
    """What torch says where it cannot compile x + 1: it lacks a C++ compiler, or one that knows its instructions.

    An empty string where it can.
    """
    try:
        torch.compile(lambda x: x + 1, backend="inductor")(torch.ones(16))
    except RuntimeError as error:  # torch._dynamo's errors are RuntimeErrors
        return f"torch cannot compile x + 1 here: {str(error).strip().splitlines()[0]}"
    return ""


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiled_is_eager(backend: str, dropout: float) -> None:
    """Without a graph break, in forward and gradients; and again after a switch."""
    if backend == "inductor" and (why := why_nothing_compiles()):
        pytest.skip(why)
    torch.manual_seed(0)
    torch._dynamo.reset()
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    options: dict[str, Any] = {"target_modules": ["0", "2"], "init_lora_weights": False, "lora_dropout": dropout}
    model = get_peft_model(base, LoraConfig(r=2, **options)).eval()
    model.add_adapter("b", LoraConfig(r=3, **options))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(3, 6).double()
    switches: list[Callable[[], Any]] = [lambda: None, lambda: model.set_adapter(["default", "b"])]
    if backend != "inductor":  # one compilation of C++ is slow enough
        switches += [model.merge_adapter, model.unmerge_adapter, model.disable_adapter_layers]
    for switch in switches:
        switch()
        grads = []
        for run in (model, compiled):
            y = run(x)
            if y.requires_grad:
                y.square().sum().backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
            grads[-1][""] = y.detach()
        agree(grads[1], grads[0])


def test_every_layer_type_compiles_without_a_break() -> None:
    torch._dynamo.reset()
    model = adapted(torch.float64).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    agree(compiled(TOKENS), model(TOKENS))


# -- gradient checkpointing --------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_a_plain_model(use_reentrant: bool) -> None:
    """The same gradients, dropout's masks included."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    config = LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, lora_dropout=0.3)
    model = get_peft_model(net, config).train()
    x = torch.randn(4, 6, requires_grad=True)
    found = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        torch.manual_seed(7)
        run(x).square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert len(found[0]) == 4 and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_checkpointing_of_gpt2(use_reentrant: bool, before: bool) -> None:
    """Reentrant checkpointing loses every gradient unless an input requires one; the order must not matter...

    ... as long as transformers' own enable_input_require_grads is called when it is switched on afterwards.
    """
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    if before:
        net.gradient_checkpointing_enable(**options)
    config = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    model = get_peft_model(net, config).train()
    if not before:
        net.gradient_checkpointing_enable(**options)
        net.enable_input_require_grads()
    ids = torch.arange(8)[None]
    model(input_ids=ids).logits.square().sum().backward()  # transformers' own loss is in float32
    with_checkpoints = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    net.gradient_checkpointing_disable()
    model(input_ids=ids).logits.square().sum().backward()
    without = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(without) == 4
    agree(with_checkpoints, without)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_with_checkpointing_is_asked_for_inputs_that_require_gradients(checkpointing: bool) -> None:
    """Reentrant checkpointing drops all gradients otherwise; transformers' own models have the method."""
    asked = []

    class Checkpointed(nn.Sequential):
        is_gradient_checkpointing = checkpointing

        def enable_input_require_grads(self) -> None:
            asked.append(self)

    net = Checkpointed(nn.Linear(2, 2))
    get_peft_model(net, LoraConfig(target_modules=["0"]))
    assert asked == [net] * checkpointing


# -- copies, meta tensors, tied weights ----------------------------------------------------------------


@pytest.mark.parametrize("state", ["plain", "merged", "disabled", "merged and disabled", "in a block"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_another_model_in_the_same_state(state: str, how: Callable[[Any], Any]) -> None:
    model = adapted()
    before, base = bits(model), model.get_base_model()
    if "merged" in state:
        model.merge_adapter()
    if "disabled" in state:
        model.disable_adapter_layers()
    if state == "in a block":
        with model.disable_adapter():
            copied = how(model)
            assert torch.equal(copied(TOKENS), model(TOKENS))
        copied.enable_adapter_layers()
    else:
        copied = how(model)
    assert torch.equal(copied(TOKENS), model(TOKENS)) and repr(copied) == repr(model)
    mine = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in mine for p in copied.parameters())
    copied.enable_adapter_layers()
    copied.unmerge_adapter()
    assert_same_bits(bits(copied), before)
    with torch.no_grad():
        stored(copied.lora_layers()["lin"])[0].zero_()
    copied.set_adapter([])
    assert model.active_adapters == ["default"] and model.get_base_model() is base
    model.enable_adapter_layers()
    model.unmerge_adapter()
    assert distance(copied(TOKENS), model(TOKENS)) > 0.01


def test_a_model_on_the_meta_device() -> None:
    """Adapting a model without memory; the adapter is loaded, or drawn, once there is some."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(6, 5), nn.Embedding(4, 3), nn.Conv1d(4, 4, 3))
    model = get_peft_model(net.double(), LoraConfig(r=2, target_modules=["0", "1", "2"]))
    assert all(p.is_meta for p in model.parameters())
    shapes = {n: p.shape for n, p in model.named_parameters()}
    model = model.to_empty(device="cpu")
    assert {n: p.shape for n, p in model.named_parameters()} == shapes and not any(
        p.is_meta for p in model.parameters()
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    x = torch.randn(3, 6).double()
    layer = model.lora_layers()["0"]
    A, B = layer.factors("default")
    want = layer.base_layer(x) + 4 * x @ A.T @ B.T
    agree(layer(x), want)


def test_an_adapter_of_the_meta_device_comes_from_its_file(tmp_path: Any) -> None:
    """As with transformers' low-memory loading: the base is filled first, the adapter read from its folder."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5))
    weights = copy.deepcopy(net.state_dict())
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(3, 6)
    y = model(x)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        again = nn.Sequential(nn.Linear(6, 5))
    again.load_state_dict(weights, assign=True)
    assert torch.equal(PeftModel.from_pretrained(again, tmp_path)(x), y)


def test_tied_weights_are_warned_about_and_merging_ends_the_tie() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"emb": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    net["head"].weight = net["emb"].weight
    W = net["emb"].weight.detach().clone()
    with pytest.warns(
        UserWarning, match=r"head: its weight is tied \(emb\.weight, head\.weight\).*merging it ends the tie"
    ):
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    layer = model.lora_layers()["head"]
    assert layer.base_weight is net["emb"].weight
    model.merge_adapter()
    assert torch.equal(net["emb"].weight, W) and not torch.equal(layer.base_weight, W)
    model.unmerge_adapter()
    assert layer.base_weight is net["emb"].weight and torch.equal(net["emb"].weight, W)
