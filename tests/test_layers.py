"""Every adapted layer against the formula y = W x + b + s B A x, written out in float64."""

import copy
import math
import warnings
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref import init as inits
from lora_ref.core.adapter_modules import frame
from lora_ref.core.layer_types import LoraLayer, is_conv1d_of_transformers
from spec_tests import agree, close, distance

FALSE_ALARM = 1e-6  # how often numbers that follow a law may be taken for some that do not


class Conv1D(nn.Module):
    """transformers' linear layer of GPT-2: the weight is stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Stacks(nn.Module):
    """Raw weights of no layer of their own: a matrix and a stack of experts."""

    def __init__(self, matrix: Tensor, stack: Tensor, is_transposed: bool) -> None:
        super().__init__()
        self.matrix, self.stack, self.is_transposed = nn.Parameter(matrix), nn.Parameter(stack), is_transposed

    def forward(self, x: Tensor) -> Tensor:
        per_expert = "ti,eio->eto" if self.is_transposed else "ti,eoi->eto"
        return torch.einsum(per_expert, F.linear(x, self.matrix), self.stack)


class ScaledEmbedding(nn.Embedding):
    """Gemma's: the rows are multiplied by a constant."""

    embed_scale = 2.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def adapt(module: nn.Module, r: int = 2, **options: Any) -> tuple[nn.Module, LoraLayer]:
    """The adapted model around one module, and its layer. A and B are random unless told otherwise."""
    options = {"init_lora_weights": False, "fan_in_fan_out": isinstance(module, Conv1D)} | options
    model = get_peft_model(nn.Sequential(OrderedDict(m=module)), LoraConfig(r=r, target_modules=["m"], **options))
    return model, model.layers()["m"]


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


# -- by hand -------------------------------------------------------------------------------------


def by_hand(module: nn.Module, A: list, B: list, **options: Any) -> nn.Module:
    model, layer = adapt(module, r=len(A), **options)
    with torch.no_grad():
        for parameter, value in zip(layer.adapter_parameters("default"), (A, B), strict=True):
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
    layer = model.layers()["m.stack"]
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
    A, B = (array(p) for p in layer.adapter_parameters("default"))
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
    A, B = (array(p) for p in layer.adapter_parameters("default"))
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


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^m: r=3 must be divisible by the convolution's groups=2"):
        adapt(nn.Conv1d(4, 4, 1, groups=2), r=3)


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
    layers = model.layers()
    assert list(layers) == [f"m.{t}" for t in reversed(targets)] and not [
        p for layer in layers.values() for p in [layer.base_weight] if p.requires_grad
    ]
    kept = {"matrix": matrix.copy(), "stack": stack.copy()}
    if "matrix" in targets:
        A, B = (array(p) for p in layers["m.matrix"].adapter_parameters("default"))
        assert A.shape == (r, 3) and B.shape == (n_in, r)
        matrix = matrix + s * B @ A
    if "stack" in targets:
        A, B = (array(p) for p in layers["m.stack"].adapter_parameters("default"))
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


@pytest.mark.parametrize("option", [{"lora_dropout": 0.1}, {"fan_in_fan_out": True}])
def test_raw_parameters_refuse_what_they_cannot_do(option: dict) -> None:
    with pytest.raises(ValueError, match="target_parameters works with lora_dropout=0 and fan_in_fan_out=False only"):
        LoraConfig(target_parameters=["m.stack"], **option)


# -- gradients -----------------------------------------------------------------------------------


def test_gradients_of_a_linear_layer_are_the_formulas() -> None:
    """dL/dA = s B^T G^T X, dL/dB = s G^T X A^T, dL/dx = G (W + s B A); none for W and b."""
    torch.manual_seed(0)
    base = nn.Linear(5, 4).double()
    model, layer = adapt(base, r=3, lora_alpha=2)
    x, G = torch.randn(2, 3, 5).double().requires_grad_(), torch.randn(2, 3, 4).double()
    model(x).backward(G)
    A, B, W = array(layer.lora_A["default"].weight), array(layer.lora_B["default"].weight), array(base.weight)
    X, G2, s = array(x).reshape(6, 5), array(G).reshape(6, 4), 2 / 3
    agree(layer.lora_A["default"].weight.grad, s * B.T @ G2.T @ X)
    agree(layer.lora_B["default"].weight.grad, s * G2.T @ X @ A.T)
    agree(array(x.grad).reshape(6, 5), G2 @ (W + s * B @ A))
    assert base.weight.grad is None and base.bias.grad is None


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


def test_raw_parameters_pass_gradcheck() -> None:
    torch.manual_seed(0)
    module = Stacks(torch.randn(3, 2), torch.randn(2, 2, 3), is_transposed=False).double()
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=["m.matrix", "m.stack"], init_lora_weights=False
    )  # fmt: skip
    model = get_peft_model(nn.Sequential(OrderedDict(m=module)), config)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    inputs = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]
    x = torch.randn(3, 2).double()
    assert len(names) == 4
    assert torch.autograd.gradcheck(
        lambda *tensors: torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,)), inputs
    )


@pytest.mark.parametrize("sparse", [False, True])
def test_the_padding_token_gets_the_update_but_no_gradient(sparse: bool) -> None:
    torch.manual_seed(0)
    base = nn.Embedding(4, 3, padding_idx=1, sparse=sparse).double()
    model, layer = adapt(base)
    x = torch.tensor([0, 1, 1, 3])
    y = model(x)
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    agree(array(y)[1], array(A)[:, 1] @ array(B).T * 4)  # E[1] is zero, s = 8 / 2
    y.backward(torch.ones_like(y))
    assert not A.grad.is_sparse and base.weight.grad is None
    assert (A.grad[:, 1] == 0).all() and (A.grad[:, 2] == 0).all() and (A.grad[:, [0, 3]] != 0).all()
    agree(B.grad, 4 * np.ones((3, 1)) * array(A)[:, [0, 1, 1, 3]].sum(1))


def test_scale_grad_by_freq_divides_by_the_count() -> None:
    torch.manual_seed(0)
    model, layer = adapt(nn.Embedding(4, 3, scale_grad_by_freq=True).double())
    model(torch.tensor([0, 1, 1, 1])).sum().backward()
    A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    once = 4 * array(B).sum(0)
    agree(A.grad[:, 0], once)
    agree(A.grad[:, 1], once)


def test_an_embedding_that_rewrites_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^m: an embedding with max_norm"):
        adapt(nn.Embedding(4, 3, max_norm=1.0))


# -- dropout -------------------------------------------------------------------------------------


def visible_masks(model: nn.Module, x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """With B_1 = [I; 0] and B_2 = [0; I] the output shows what each adapter saw of x."""
    y = model(x) - 7  # the base output is 7 everywhere
    return y[:, :half], y[:, half:]


@pytest.mark.parametrize("conv", [False, True])
def test_each_active_adapter_drops_inputs_on_its_own(conv: bool) -> None:
    """P1, P2: inverted elementwise dropout of A's input, in training only; the base sees all of x."""
    n, p = 50, 0.25
    base: nn.Module = nn.Conv1d(n, 2 * n, 1) if conv else nn.Linear(n, 2 * n)
    nn.init.zeros_(base.weight)
    nn.init.constant_(base.bias, 7)
    model, layer = adapt(base, r=n, lora_alpha=n, lora_dropout=p)
    model.add_adapter("second", LoraConfig(r=n, lora_alpha=n, lora_dropout=p, target_modules=["m"]))
    eye = torch.eye(n)
    for name, B in (("default", torch.cat([eye, 0 * eye])), ("second", torch.cat([0 * eye, eye]))):
        with torch.no_grad():
            layer.lora_A[name].weight.copy_(eye.reshape(layer.lora_A[name].weight.shape))
            layer.lora_B[name].weight.copy_(B.reshape(layer.lora_B[name].weight.shape))
    model.set_adapter(["default", "second"])
    torch.manual_seed(0)
    x = torch.full((20, n, 10) if conv else (200, n), 3.0)
    first, second = visible_masks(model.train(), x, n)
    for seen in (first, second):
        kept = seen != 0  # each element is dropped or scaled, on its own
        # the quotient, its product with 3, the sum with 7 and the difference
        close(seen[kept], torch.full_like(seen[kept], 3 / (1 - p)), terms=4, size=7 + 3 / (1 - p))
        dropped = 1 - kept.double().mean().item()
        assert abs(dropped - p) < 5 * math.sqrt(p * (1 - p) / x.numel())
    both = ((first == 0) & (second == 0)).double().mean().item()
    assert abs(both - p * p) < 5 * math.sqrt(p * p * (1 - p * p) / x.numel())  # independent masks
    assert all((seen == 3).all() for seen in visible_masks(model.eval(), x, n))
    model.train().merge_adapter()
    assert all((seen == 3).all() for seen in visible_masks(model, x, n))


def test_the_base_sees_undropped_inputs() -> None:
    base = nn.Linear(8, 8)
    model, _ = adapt(base, lora_dropout=1.0)
    x = torch.randn(3, 8)
    assert torch.equal(model.train()(x), base(x))  # p = 1: no branch at all, and no NaN
    assert not torch.equal(model.eval()(x), base(x))


def test_embeddings_ignore_dropout() -> None:
    model, layer = adapt(nn.Embedding(10, 4), lora_dropout=0.9)
    x = torch.arange(10)
    assert torch.equal(model.train()(x), model.eval()(x))
    assert not any(isinstance(m, nn.Dropout) for m in layer.modules())


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, math.inf, "0.1", True, None])
def test_dropout_is_a_probability(p: Any) -> None:
    with pytest.raises(ValueError, match="lora_dropout"):
        LoraConfig(lora_dropout=p)


def test_a_new_adapter_drops_only_while_its_layer_trains() -> None:
    base = nn.Sequential(OrderedDict(m=nn.Linear(8, 8))).eval()
    model = get_peft_model(base, LoraConfig(target_modules=["m"], lora_dropout=0.5, init_lora_weights=False))
    x = torch.randn(4, 8)
    assert torch.equal(base(x), base(x))
    assert not torch.equal(model.train()(x), model(x))


# -- scaling -------------------------------------------------------------------------------------


def test_the_scaling_of_a_layer() -> None:
    """S1, S3: alpha / r, with rsLoRA alpha / sqrt(r); defaults, zero, negative."""
    found = {}
    for key in [(8, 8, False), (8, 8, True), (4, 2, False), (4, 2, True), (4, 0, False), (4, -2, True)]:
        r, alpha, use_rslora = key
        found[key] = adapt(nn.Linear(9, 9), r=r, lora_alpha=alpha, use_rslora=use_rslora)[1].scaling["default"]
    assert list(found.values()) == [1, 8 / math.sqrt(8), 0.5, 1, 0, -1]
    default = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])).layers()["0"]
    assert default.r["default"] == 8 and default.scaling["default"] == 1


def test_rank_and_alpha_patterns_are_independent() -> None:
    """S2: a larger rank alone lowers s."""
    net = nn.ModuleDict({name: nn.Linear(9, 9) for name in "abcd"})
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=list("abcd"), rank_pattern={"b": 8, "d": 2}, alpha_pattern={"c": 2, "d": 6}
    )
    layers = get_peft_model(net, config).layers()
    assert {n: (x.r["default"], x.scaling["default"]) for n, x in layers.items()} == {
        "a": (4, 2), "b": (8, 1), "c": (4, 0.5), "d": (2, 3)
    }  # fmt: skip


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


@given(st.floats(-4, 4), st.floats(-4, 4))
@settings(deadline=None, max_examples=20)
def test_the_branch_is_proportional_to_the_scaling(alpha: float, factor: float) -> None:
    """S5, and alpha = 0 and < 0."""
    torch.manual_seed(0)
    base = nn.Linear(4, 4).double()
    model, layer = adapt(base, r=2, lora_alpha=1.0)
    x = torch.randn(3, 4).double()
    unit = (model(x) - base(x)) * 2
    layer.initial_scaling["default"] = alpha
    model.set_scale("default", factor)
    # both differences cancel: what was summed is as large as the base's output
    agree(model(x) - base(x), alpha * factor * unit, size=max(1, abs(alpha * factor)) * base(x).abs().max().item())


# -- initialisations -----------------------------------------------------------------------------

KINDS = {
    "Linear": (lambda: nn.Linear(40, 30), 40),
    "Conv1D": (lambda: Conv1D(30, 40), 40),
    "Conv2d": (lambda: nn.Conv2d(10, 30, (2, 3)), 60),
    "Embedding": (lambda: nn.Embedding(40, 30), 40),
}


def draws(kind: str, init: bool | str, r: int = 8, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """All the numbers in A and in B of n adapters."""
    torch.manual_seed(0)
    pairs = []
    for _ in range(n):
        base = KINDS[kind][0]()
        _, layer = adapt(base, r=r, init_lora_weights=init)
        pairs.append([array(p).ravel() for p in layer.adapter_parameters("default")])
    A, B = (np.concatenate(x).astype(np.float64) for x in zip(*pairs, strict=True))
    return A, B


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


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d"])
def test_inits_of_linear_layers_and_convolutions(kind: str) -> None:
    fan_in, r = KINDS[kind][1], 8
    A, B = draws(kind, True)
    assert_uniform(A, 1 / math.sqrt(fan_in))  # I1
    assert not B.any()
    A, B = draws(kind, "gaussian")
    assert_normal(A, 1 / r)  # I3: the standard deviation, not the variance
    assert not B.any()
    A, B = draws(kind, False)
    assert_uniform(A, 1 / math.sqrt(fan_in))  # I4
    assert_uniform(B, 1 / math.sqrt(r))


def test_inits_of_embeddings() -> None:
    for init in (True, "gaussian"):  # I2, I3
        A, B = draws("Embedding", init)
        assert not A.any()
        assert_normal(B, 1)
    for x in draws("Embedding", False):  # I4
        assert_normal(x, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", [True, "gaussian", "GAUSSIAN"])
def test_the_start_is_exactly_the_base(kind: str, init: Any) -> None:
    """I6, I7."""
    base = KINDS[kind][0]()
    W = base.weight.detach().clone()
    x = (
        torch.randint(40, (5,))
        if kind == "Embedding"
        else torch.randn(2, 10, 4, 4)
        if kind == "Conv2d"
        else W.new_ones(40)
    )
    y = base(x)
    model, layer = adapt(base, init_lora_weights=init)
    assert not layer.delta("default").any()
    assert torch.equal(model(x), y) and torch.equal(base.weight, W)
    model.merge_adapter()
    assert torch.equal(base.weight, W)


RANDOM = (True, False, "gaussian", "orthogonal")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random_inits() -> list[Any]:
    """Every function behind the random values of `init_lora_weights`, once."""
    return sorted({f for value in RANDOM for f in inits.METHODS[value].kinds.values()}, key=lambda f: f.__name__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_and_torch_draw_from_the_same_laws(dtype: torch.dtype) -> None:
    """One function for both libraries; two-sample Kolmogorov-Smirnov of every factor."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for method in random_inits():
        in_numpy = method(np.zeros((30, 40)), 8, 1.0, rng=rng)
        in_torch = method(torch.zeros(30, 40, dtype=dtype), 8, 1.0, rng=generator)
        for a, b in zip(in_numpy[:2], in_torch[:2], strict=True):
            assert a.shape == tuple(b.shape) and isinstance(a, np.ndarray) and isinstance(b, Tensor)
            assert a.dtype == np.float64
            assert scipy.stats.ks_2samp(a.ravel(), b.numpy().ravel()).pvalue > FALSE_ALARM


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_factors_of_orthogonal_cancel_to_the_rounding_of_their_dtype(dtype: torch.dtype) -> None:
    """G1: B A = 0. The QR of r by r numbers leaves rows orthogonal to 8 r^2 roundings (Higham, 19.4, with 8 for c)."""
    for r in (2, 8, 16):
        A, B, residual, _ = inits.orthogonal(torch.zeros(50, 60, dtype=dtype), r, 1.0, torch.Generator().manual_seed(0))
        assert residual is None
        size = np.outer(np.linalg.norm(array(B), axis=1), np.linalg.norm(array(A), axis=0))
        drawn_in = torch.promote_types(dtype, torch.float32)
        close(B.double() @ A.double(), np.zeros_like(size), terms=8 * r**2, size=size, dtype=drawn_in)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_orthogonal(dtype: torch.dtype) -> None:
    """G1, G2: B A = 0 with both non-zero, each of rank r / 2; the base is untouched."""
    torch.manual_seed(0)
    for r in (2, 8, 16):
        base = nn.Linear(60, 50).to(dtype)
        W = base.weight.detach().clone()
        _, layer = adapt(base, r=r, init_lora_weights="orthogonal")
        A, B = (array(p).astype(np.float64) for p in layer.adapter_parameters("default"))
        # QR of r by r numbers leaves rows orthogonal to 8 r^2 roundings (Higham, 19.4, with 8 for his c)
        size = np.outer(np.linalg.norm(B, axis=1), np.linalg.norm(A, axis=0))
        close(B @ A, np.zeros_like(size), terms=8 * r**2, size=size, dtype=dtype)
        for factor in (A, B):
            assert np.linalg.matrix_rank(factor, tol=1e-3) == r // 2
        assert torch.equal(base.weight, W)


@pytest.mark.parametrize("r", [2, 8, 32])
def test_orthogonal_in_numpy(r: int) -> None:
    """In float64 B A is zero to its roundings, and the entries have standard deviation sqrt(1/2) / 10 for any r."""
    rng = np.random.default_rng(0)
    pairs = [inits.orthogonal(np.zeros((50, 60)), r, rng=rng)[:2] for _ in range(100)]
    for A, B in pairs:
        size = np.outer(np.linalg.norm(B, axis=1), np.linalg.norm(A, axis=0))
        close(B @ A, np.zeros_like(size), terms=8 * r**2, size=size)  # as above
    for factors, n in ((np.stack([A for A, _ in pairs]), 60), (np.stack([B for _, B in pairs]), 50)):
        independent = 100 * n * r // 2  # normal numbers behind the entries
        assert abs(factors.var() - 0.005) < 6 * 0.005 * math.sqrt(2 / independent)


def test_orthogonal_needs_an_even_rank_and_a_linear_layer() -> None:
    with pytest.raises(ValueError, match=r"^m: init_lora_weights='orthogonal' needs an even rank, r=3 is odd"):
        adapt(nn.Linear(4, 4), r=3, init_lora_weights="orthogonal")
    for module in (nn.Conv1d(4, 4, 1), nn.Embedding(4, 4)):
        with pytest.raises(ValueError, match=r"^m: init_lora_weights='orthogonal' is not available for"):
            adapt(module, r=2, init_lora_weights="orthogonal")


@pytest.mark.parametrize("init", ["gausian", "", "pissa_niter_", "pissa_niter_-1", "pissa_niter_x", 1, None, 0.5])
def test_only_documented_inits_are_accepted(init: Any) -> None:
    with pytest.raises(ValueError, match=r"init_lora_weights=.*must be True, False, .*'gaussian'"):
        LoraConfig(init_lora_weights=init)


def test_a_rank_beyond_the_layer_is_allowed_for_random_inits() -> None:
    """D8: the tensors are just taller."""
    for init in (True, False, "gaussian"):
        _, layer = adapt(nn.Linear(3, 2), r=7, init_lora_weights=init)
        assert [tuple(p.shape) for p in layer.adapter_parameters("default")] == [(7, 3), (2, 7)]


# -- modules whose parent reads the weight itself --------------------------------------------------


def test_multihead_attention_is_refused_where_it_would_never_run() -> None:
    net = nn.Sequential(OrderedDict(attn=nn.MultiheadAttention(8, 2), fc=nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"^attn\.out_proj: nn\.MultiheadAttention reads out_proj\.weight"):
        get_peft_model(net, LoraConfig(target_modules="all-linear"))
    assert type(net.attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    model = get_peft_model(net, LoraConfig(target_modules="all-linear", exclude_modules=["out_proj"]))
    assert list(model.layers()) == ["fc"]


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
            plain.weight += layer.delta("default")
            setattr(copied, name, plain)
        agree(adapted, copied(x))
        assert distance(adapted, base) > 0.01
        calls.clear()
        model.unload()
        assert torch.equal(net(x), base) and len(calls) == 1


def test_unsupported_modules_are_named() -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"^m: LSTM cannot be adapted; Linear, Conv1D"):
        adapt(nn.LSTM(3, 3))


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


def test_what_an_initialisation_took_is_part_of_the_frame() -> None:
    """... which transactions cover; an adapter's own numbers are not."""
    _, layer = adapt(nn.Linear(4, 4), r=1, init_lora_weights="pissa")
    covered = frame(layer)
    assert layer.lora_taken in covered and layer.base_layer in covered and layer.lora_A not in covered
