"""Every adapted layer against the formula y = W x + b + s B A x, written out in float64."""

import copy
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Conv1D, ScaledEmbedding, Stacks, adapt, stored
from torch import Tensor, nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref.core.layer_types import LoraLayer, is_conv1d_of_transformers
from lora_ref.safe.atomic import tree
from spec_tests import agree, close, distance


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


# -- by hand -------------------------------------------------------------------------------------


def by_hand(module: nn.Module, A: list, B: list, **options: Any) -> nn.Module:
    model, layer = adapt(module, r=len(A), **options)
    with torch.no_grad():
        for parameter, value in zip(stored(layer), (A, B), strict=True):
            parameter.copy_(torch.tensor(value).reshape(parameter.shape))
    return model


def test_a_linear_layer_by_hand() -> None:
    """W = [[1, 2], [3, 4]], B A = [[3, 6], [4, 8]], s = 4 / 1 - 2 = ... as on paper."""
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        linear.bias.copy_(torch.tensor([10.0, 20.0]))
    model = by_hand(linear, A=[[1.0, 2.0]], B=[[3.0], [4.0]], lora_alpha=2)
    # base: W x + b = [3, 7] + [10, 20];  A x = 3;  B A x = [9, 12];  s = 2 / 1
    assert model(torch.ones(2)).tolist() == [13 + 18, 27 + 24]
    model.merge_adapter()
    assert linear.weight.tolist() == [[1 + 6, 2 + 12], [3 + 8, 4 + 16]]
    assert model(torch.ones(2)).tolist() == [31, 51]
    model.unmerge_adapter()
    assert linear.weight.tolist() == [[1, 2], [3, 4]]


def test_transposed_storage_by_hand() -> None:
    """The same layer, stored as W^T: A and B are the same, the stored update is (s B A)^T."""
    conv1d = Conv1D(2, 2)
    with torch.no_grad():
        conv1d.weight.copy_(torch.tensor([[1.0, 3.0], [2.0, 4.0]]))
        conv1d.bias.copy_(torch.tensor([10.0, 20.0]))
    model = by_hand(conv1d, A=[[1.0, 2.0]], B=[[3.0], [4.0]], lora_alpha=2)
    assert model(torch.ones(2)).tolist() == [31, 51]
    model.merge_adapter()
    assert conv1d.weight.tolist() == [[7, 11], [14, 20]]


def test_an_embedding_by_hand() -> None:
    """Row i is E[i] + s A[:, i] B^T."""
    embedding = nn.Embedding(2, 2)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    model = by_hand(embedding, A=[[5.0, 7.0]], B=[[1.0], [10.0]], lora_alpha=2)
    assert model(torch.tensor([0, 1, 1])).tolist() == [[11, 102], [17, 144], [17, 144]]
    model.merge_adapter()
    assert embedding.weight.tolist() == [[11, 102], [17, 144]]


def test_a_convolution_by_hand() -> None:
    """A is a convolution with the base's kernel, B mixes its channels; flattened it is B A again."""
    conv = nn.Conv1d(1, 2, 2, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
    model = by_hand(conv, A=[[1.0, -1.0]], B=[[1.0], [2.0]], lora_alpha=3)
    x = torch.tensor([[5.0, 7.0, 4.0]])
    # base: [5, 7] and [7, 4];  A x = [5 - 7, 7 - 4] = [-2, 3];  s B A x = [-6, 9] and [-12, 18]
    assert model(x).tolist() == [[-1, 16], [-5, 22]]
    model.merge_adapter()
    assert conv.weight.tolist() == [[[4, -3]], [[6, -5]]]


def test_two_experts_by_hand() -> None:
    """E = 2 experts, r = 1: A's rows are the experts' in turn, and so are B's columns."""
    module = Stacks(torch.eye(2), torch.zeros(2, 2, 2), is_transposed=False)
    config = LoraConfig(r=1, lora_alpha=2, target_modules=[], target_parameters=["m.stack"])
    model = get_peft_model(nn.Sequential(OrderedDict(m=module)), config)
    layer = model.lora_layers()["m.stack"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # (r*E, in)
        layer.lora_B["default"].weight.copy_(torch.tensor([[5.0, 7.0], [6.0, 8.0]]))  # (out, r*E)
    # expert 0: A x = 3, B = [5, 6];  expert 1: A x = 7, B = [7, 8];  s = 2
    assert model(torch.ones(1, 2)).tolist() == [[[30, 36]], [[98, 112]]]
    model.merge_adapter()
    assert module.stack.tolist() == [[[10, 20], [12, 24]], [[42, 56], [48, 64]]]


# -- any shape -----------------------------------------------------------------------------------


@st.composite
def cases(draw: st.DrawFn, groups: tuple[int, ...] = (1,)) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """A base module in float64, an input for it, and how to adapt it."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    n_in, n_out = draw(st.sampled_from([(4, 4), (2, 6), (6, 2), (4, 8)]))
    kind = draw(st.sampled_from(["Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d"]))
    options: dict[str, Any] = {
        "r": draw(st.sampled_from([1, 2, 4, 10])),
        "lora_alpha": draw(st.sampled_from([8, 1, 0.3, 0, -2.5])),
        "use_rslora": draw(st.booleans()),
    }
    bias = draw(st.booleans())
    tokens = draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (2, 1, 2, 2)]))
    module: nn.Module
    if kind == "Linear":
        module, x = nn.Linear(n_in, n_out, bias), torch.randn(*tokens, n_in)
    elif kind == "Conv1D":
        module, x = Conv1D(n_out, n_in), torch.randn(*tokens, n_in)
    elif kind == "Embedding":
        module = draw(st.sampled_from([nn.Embedding, ScaledEmbedding]))(
            n_in, n_out, padding_idx=draw(st.sampled_from([None, 0, -1]))
        )
        nn.init.normal_(module.weight)  # the padding row too
        return module.double(), torch.randint(n_in, tokens), options
    else:
        size = int(kind[-2])
        shape = draw(
            st.fixed_dictionaries(
                {
                    "kernel_size": st.tuples(*[st.integers(1, 3)] * size),
                    "stride": st.integers(1, 2),
                    "padding": st.sampled_from([0, 1, 2, "same", "valid"]),
                    "dilation": st.integers(1, 2),
                    "padding_mode": st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
                    "groups": st.sampled_from(groups),
                }
            )
        )
        if shape["padding"] == "same":
            shape["stride"] = 1
        if shape["groups"] > 1:
            options["r"] = draw(st.sampled_from([2, 4, 10]))
        module = getattr(nn, kind)(n_in, n_out, bias=bias, **shape)
        batch = draw(st.sampled_from([(), (1,), (3,)]))
        x = torch.randn(*batch, n_in, *draw(st.tuples(*[st.integers(6, 7)] * size)))
    return module.double(), x.double(), options


def explicit_update(layer: LoraLayer, s: float, absolute: bool = False) -> np.ndarray:
    """s B A in the storage of the base weight, in NumPy, from the tensors as the adapter file has them."""
    A, B = (array(p) for p in stored(layer))
    if absolute:
        A, B, s = abs(A), abs(B), abs(s)
    base = layer.get_base_layer()
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return s * np.einsum("oq,qi...->oi...", B.reshape(B.shape[:2]), A)
    D = s * np.einsum("or,ri->oi", B, A)
    return D if isinstance(base, nn.Linear) else D.T


def run_with(module: nn.Module, x: Tensor, weight: np.ndarray, absolute: bool = False) -> np.ndarray:
    """The plain module's output with this weight; or the same on absolute values, an error bound's measure."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    parameters["weight"] = torch.tensor(weight)
    if absolute:
        parameters = {name: p.abs() for name, p in parameters.items()}
        x = x.abs()
    return array(torch.func.functional_call(module, parameters, (x,)))


@given(cases())
@settings(deadline=None, max_examples=120)
def test_adapted_is_merged_is_the_explicit_sum(case: tuple) -> None:
    base, x, options = case
    plain, W = copy.deepcopy(base), array(base.weight)
    r, alpha = options["r"], options["lora_alpha"]
    s = alpha / (math.sqrt(r) if options["use_rslora"] else r)
    model, layer = adapt(base, **options)
    merged, sizes = W + explicit_update(layer, s), abs(W) + explicit_update(layer, s, absolute=True)
    want, size = run_with(plain, x, merged), run_with(plain, x, sizes, True)
    # the sums over fan_in and r, the products with s, B, A and x, the bias, the factor of an embedding
    terms = fan_in(base) + r + 6
    for mode in (True, False):
        close(model.train(mode)(x), want, terms, size)
    model.merge_adapter()
    close(model(x), want, terms, size)
    close(base.weight, merged, terms=r + 4, size=sizes)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    model.unmerge_adapter()
    assert array(base.weight).tobytes() == W.tobytes()
    assert model.unload().m is base and torch.equal(base(x), plain(x))


def fan_in(module: nn.Module) -> int:
    """How many products there are in a sum; an embedding looks its rows up."""
    if isinstance(module, nn.Embedding):
        return 1
    return module.weight.shape[0] if isinstance(module, Conv1D) else module.weight[0].numel()


def dense(conv: nn.Module) -> nn.Module:
    """The same convolution with groups = 1: zeros where a group sees no input."""
    settings = {k: getattr(conv, k) for k in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    full = type(conv)(conv.in_channels, conv.out_channels, bias=conv.bias is not None, **settings).double()
    with torch.no_grad():
        full.weight.zero_()
        for o in range(conv.out_channels):
            g = o // (conv.out_channels // conv.groups)
            n = conv.in_channels // conv.groups
            full.weight[o, g * n : (g + 1) * n] = conv.weight[o]
        if conv.bias is not None:
            full.bias.copy_(conv.bias)
    return full


@given(cases(groups=(2,)).filter(lambda case: getattr(case[0], "groups", 1) == 2))
@settings(deadline=None, max_examples=25)
def test_a_grouped_convolution_shares_out_the_rank_and_cannot_be_merged(case: tuple) -> None:
    base, x, options = case
    r, alpha = options["r"], options["lora_alpha"]
    s = alpha / (math.sqrt(r) if options["use_rslora"] else r)
    model, layer = adapt(base, **options)
    A, B = (array(p) for p in stored(layer))
    full, half = dense(base), base.out_channels // 2

    def update(s: float, B: np.ndarray, A: np.ndarray) -> np.ndarray:
        return np.concatenate([s * np.einsum("oq,qi...->oi...", B.reshape(B.shape[:2])[o], A[q]) for o, q in zip(
            (slice(None, half), slice(half, None)), (slice(None, r // 2), slice(r // 2, None)), strict=True
        )])  # fmt: skip

    want = run_with(full, x, array(full.weight) + update(s, B, A))
    size = run_with(full, x, abs(array(full.weight)) + update(abs(s), abs(B), abs(A)), absolute=True)
    close(model(x), want, terms=fan_in(full) + r + 6, size=size)
    before = array(base.weight)
    with pytest.raises(ValueError, match=r"m: .*groups=2 cannot be merged"):
        model.merge_adapter()
    assert not layer.merged and array(base.weight).tobytes() == before.tobytes()


@given(
    st.sampled_from([(2, 3, 4), (1, 2, 5), (3, 4, 2)]),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([["matrix"], ["stack"], ["matrix", "stack"]]),
    st.sampled_from([1.0, -3.0, 0.0]),
)
@settings(deadline=None, max_examples=40)
def test_raw_parameters(
    shape: tuple, r: int, is_transposed: bool, use_rslora: bool, targets: list[str], alpha: float
) -> None:
    """A matrix, a stack stored either way, and both of one module: a wrapper in a wrapper."""
    torch.manual_seed(0)
    E, n_out, n_in = shape
    stack = torch.randn(E, n_in, n_out) if is_transposed else torch.randn(E, n_out, n_in)
    module = Stacks(torch.randn(n_in, 3), stack, is_transposed).double()
    matrix, stack, x = array(module.matrix), array(module.stack), torch.randn(4, 3).double()
    model = get_peft_model(
        nn.Sequential(OrderedDict(m=module)),
        LoraConfig(
            r=r, lora_alpha=alpha, use_rslora=use_rslora, init_lora_weights=False,
            target_modules=[], target_parameters=[f"m.{t}" for t in targets],
        ),
    )  # fmt: skip
    s = alpha / (math.sqrt(r) if use_rslora else r)
    layers = model.lora_layers()
    assert list(layers) == [f"m.{t}" for t in reversed(targets)] and not [
        p for layer in layers.values() for p in [layer.base_weight] if p.requires_grad
    ]
    kept = {"matrix": matrix.copy(), "stack": stack.copy()}
    if "matrix" in targets:
        A, B = (array(p) for p in stored(layers["m.matrix"]))
        assert A.shape == (r, 3) and B.shape == (n_in, r)
        matrix = matrix + s * B @ A
    if "stack" in targets:
        A, B = (array(p) for p in stored(layers["m.stack"]))
        assert A.shape == (r * E, n_in) and B.shape == (n_out, r * E)
        D = np.stack([s * B.reshape(n_out, r, E)[:, :, e] @ A.reshape(E, r, n_in)[e] for e in range(E)])
        stack = stack + (D.swapaxes(1, 2) if is_transposed else D)
    W = stack.swapaxes(1, 2) if is_transposed else stack
    want = np.stack([array(x) @ matrix.T @ W[e].T for e in range(E)])
    agree(model(x), want)
    model.merge_adapter()
    agree(model(x), want)
    agree([module.matrix, module.stack], [matrix, stack])
    model.unmerge_adapter()
    assert array(module.matrix).tobytes() == kept["matrix"].tobytes()
    assert array(module.stack).tobytes() == kept["stack"].tobytes()
    assert model.unload().m is module


@given(cases(groups=(1, 2)).filter(lambda case: 0 < case[1].numel() <= 48))
@settings(deadline=None, max_examples=30)
def test_gradients_pass_gradcheck(case: tuple) -> None:
    base, x, options = case
    model, _ = adapt(base, **(options | {"r": 2}))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 and not any(p.requires_grad for p in base.parameters())
    inputs = [p.detach().clone().requires_grad_() for p in trained.values()]
    if x.is_floating_point():
        inputs.append(x.clone().requires_grad_())

    def run(A: Tensor, B: Tensor, x: Tensor = x) -> Tensor:
        return torch.func.functional_call(model, dict(zip(trained, (A, B), strict=True)), (x,))

    if getattr(base, "padding_idx", None) is not None:  # its gradient is not the derivative: see the next test
        return
    assert torch.autograd.gradcheck(run, inputs)


def test_a_sparse_embedding_gives_its_factors_dense_gradients() -> None:
    model, layer = adapt(nn.Embedding(4, 3, sparse=True))
    model(torch.tensor([0, 3])).sum().backward()
    A, B = stored(layer)
    assert layer.base_weight.grad is None and not A.grad.is_sparse and not B.grad.is_sparse


def test_scale_grad_by_freq_divides_by_the_count() -> None:
    torch.manual_seed(0)
    model, layer = adapt(nn.Embedding(4, 3, scale_grad_by_freq=True).double())
    model(torch.tensor([0, 1, 1, 1])).sum().backward()
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    once = 4 * array(B).sum(0)
    agree(A.grad[:, 0], once)
    agree(A.grad[:, 1], once)


def test_a_new_adapter_drops_only_while_its_layer_trains() -> None:
    base = nn.Sequential(OrderedDict(m=nn.Linear(8, 8))).eval()
    model = get_peft_model(base, LoraConfig(target_modules=["m"], lora_dropout=0.5, init_lora_weights=False))
    x = torch.randn(4, 8)
    assert torch.equal(base(x), base(x))
    assert not torch.equal(model.train()(x), model(x))


def test_set_scale_scale_and_unscale() -> None:
    """S4."""
    model, layer = adapt(nn.Linear(4, 4), r=2, lora_alpha=3)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=8, target_modules=["m"]))
    layer.set_scale("default", 4)
    assert layer.scaling == {"default": 6, "other": 4}
    layer.set_scale("default", 2)  # from the initial one, not from the last
    layer.scale_layer(5)
    assert layer.scaling == {"default": 15, "other": 4}  # active ones only
    layer.unscale_layer(2)
    assert layer.scaling["default"] == 7.5
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.5, "other": 4}


# -- modules whose parent reads the weight itself --------------------------------------------------


def test_multihead_attention_as_raw_parameters() -> None:
    """The advice of that error message: with in_proj_weight, merged equals unmerged, on the fast path too."""
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(attn=nn.MultiheadAttention(8, 2, batch_first=True))).double().eval()
    net.requires_grad_(False)
    x = torch.randn(2, 3, 8).double()
    base = net.attn(x, x, x)[0]
    config = LoraConfig(r=2, target_modules=[], target_parameters=["in_proj_weight"], init_lora_weights=False)
    model = get_peft_model(net, config)
    adapted = net.attn(x, x, x)[0]
    assert distance(adapted, base) > 0.01
    with torch.no_grad():
        agree(net.attn(x, x, x)[0], adapted)
    model.merge_adapter()
    agree(net.attn(x, x, x)[0], adapted)
    model.unload()
    assert torch.equal(net.attn(x, x, x)[0], base)


def test_an_encoder_layer_leaves_its_fast_path_and_finds_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """In eval without gradients PyTorch would run linear1.weight and linear2.weight in one fused kernel."""
    torch.manual_seed(0)
    calls = []
    fused = torch._transformer_encoder_layer_fwd

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    net = nn.Sequential(OrderedDict(block=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))).double().eval()
    net.requires_grad_(False)
    x = torch.randn(2, 3, 8).double()
    with torch.no_grad():
        base = net(x)
        assert len(calls) == 1
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False))
        model.eval()
        adapted = model(x)
        assert len(calls) == 1
        copied = copy.deepcopy(net.block)
        for name in ("linear1", "linear2"):
            layer = getattr(copied, name)
            plain = layer.get_base_layer()
            plain.weight += layer.update("default")
            setattr(copied, name, plain)
        agree(adapted, copied(x))
        assert distance(adapted, base) > 0.01
        calls.clear()
        model.unload()
        assert torch.equal(net(x), base) and len(calls) == 1


def test_repr_says_rank_scaling_and_state() -> None:
    model, layer = adapt(nn.Linear(3, 2), r=2, lora_alpha=3)
    assert repr(layer) == (
        "lora.Linear(Linear(in_features=3, out_features=2, bias=True); default: r=2 alpha=3 s=1.5 (active))"
    )
    model.merge_adapter()
    model.disable_adapter_layers()
    assert repr(layer).endswith("default: r=2 alpha=3 s=1.5 (active, merged); all disabled)")


@pytest.mark.parametrize("name", ["Another", "Conv1d", "Zoned"])
def test_only_conv1d_by_name_is_taken_for_transformers_conv1d(name: str) -> None:
    """A module with `nf` and a weight matrix may compute anything."""
    assert is_conv1d_of_transformers(Conv1D(2, 2)) and not is_conv1d_of_transformers(type(name, (Conv1D,), {})(2, 2))


def test_the_modules_of_an_adapter_are_not_among_those_that_may_hold_wrappers() -> None:
    _, layer = adapt(nn.Linear(4, 4), r=1, init_lora_weights="pissa")
    found = tree(layer, factors=False)
    assert layer.base_layer in found and layer.lora_A not in found and layer.lora_initial not in found


@pytest.mark.parametrize(
    "base", [nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv2d(2, 4, 3), nn.Conv1d(4, 4, 1, groups=2)]
)
def test_a_further_adapter_is_frozen_until_it_is_active(base: nn.Module) -> None:
    model, layer = adapt(base)
    model.add_adapter("b", model.peft_config["default"])
    assert {p.requires_grad for name, p in layer.adapter_parameters() if name == "b"} == {False}
    model.set_adapter("b")
    assert {p.requires_grad for name, p in layer.adapter_parameters() if name == "b"} == {True}


def test_a_batch_of_base_samples_runs_through_a_raw_parameter() -> None:
    torch.manual_seed(0)
    base = nn.Linear(4, 4)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"], init_lora_weights=False)
    model, x = get_peft_model(nn.Sequential(base), config).eval(), torch.randn(3, 4)
    want = torch.nn.functional.linear(x, base.weight, base.bias)
    assert torch.equal(model(x, adapter_names=["__base__"] * 3), want) and not torch.equal(model(x), want)
    with pytest.raises(ValueError, match="one weight serves all samples"):
        model(x, adapter_names=["__base__", "default", "__base__"])


def test_a_weight_that_was_merged_is_the_same_parameter_afterwards_even_if_the_model_was_cast() -> None:
    model, layer = adapt(nn.Linear(4, 4), init_lora_weights=False)
    W, values = layer.base_weight, layer.base_weight.detach().clone()
    model.merge_adapter()
    model.double()
    model.unmerge_adapter()
    assert layer.base_weight is W and torch.equal(W, values.double())


@pytest.mark.parametrize("part", ["the base", "lora_A", "lora_B"])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_layer_on_two_devices_is_an_error_that_names_the_part(part: str, replaced: bool) -> None:
    model, layer = adapt(nn.Linear(3, 2))
    holder, name = (layer, "base_layer") if part == "the base" else (getattr(layer, part), "default")
    moved = getattr(holder, name).to("meta")
    setattr(holder, name, nn.Sequential(nn.Identity(), moved) if replaced and part != "the base" else moved)
    with pytest.raises(ValueError, match=rf"the input is on cpu, {part}.* on meta: move the model to one device"):
        model(torch.ones(1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_factor_with_a_hook_gets_x_in_its_dtype_unless_that_is_narrower(dtype: torch.dtype) -> None:
    """A hook may cast a narrow weight when the factor is called, as layerwise casting does."""
    model, layer = adapt(nn.Linear(3, 2).to(dtype))
    layer.to(torch.float16)
    layer.base_layer.to(dtype)
    got = []
    for part in (layer.lora_A, layer.lora_B):
        part["default"].register_forward_pre_hook(lambda module, args: got.append(args[0].dtype))
        if dtype.itemsize > 2:  # the cast
            part["default"].register_forward_pre_hook(lambda module, args: module.to(args[0].dtype) and None)
    assert model(torch.ones(1, 3, dtype=dtype)).dtype == dtype
    assert got == ([torch.float16] * 2 if dtype.itemsize == 2 else [dtype] * 2)
