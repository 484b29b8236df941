"""`preprocess_loraga`: how the gradient is found, and the model that starts from it."""

import contextlib
import math
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.loraga import preprocess_loraga as peft_preprocess_loraga
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_ref
from lora_ref import LoraConfig
from lora_ref.calibration.preprocess import preprocess_loraga
from lora_ref.init.lora_ga import lora_ga
from lora_ref.init.options import LoraGAConfig
from spec_tests import agree, close


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8, dtype=dtype)
        self.second = nn.Linear(8, 5, dtype=dtype)
        self.norm = nn.LayerNorm(5, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.second(self.first(x).tanh()))


def batches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(tokens, 6, generator=g).to(dtype) for tokens in (20, 3, 11)]


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - torch.arange(5)).square().mean()


def stepping(model: nn.Module, zero_grad: bool = False):
    def step() -> None:
        for x in batches(model.first.weight.dtype):
            if zero_grad:
                model.zero_grad(set_to_none=False)
            loss(model, x).backward()

    return step


def settings(**kwargs) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["first", "second"], "init_lora_weights": "lora_ga"} | kwargs)


def mean_gradient(model: nn.Module, name: str) -> torch.Tensor:
    W = model.get_submodule(name).weight
    return sum(torch.autograd.grad(loss(model, x), W)[0] for x in batches(W.dtype)) / 3


@pytest.mark.parametrize("zero_grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"direction": "A2rBr", "scale": "gd_scale"}, {"stable_gamma": 64}])
def test_the_run_and_the_pure_function_are_one_formula(options, zero_grad):
    model = Net(torch.float64)
    config = settings(lora_ga_config=LoraGAConfig(**options) if options else None)
    preprocess_loraga(model, config, stepping(model, zero_grad), progress=False)
    for name in ("first", "second"):
        W = model.get_submodule(name).weight.detach()
        got = model.get_submodule(name).prepared_init["lora_ga"](W, 2, 3.0)
        want = lora_ga(W, 2, 3.0, gradient=mean_gradient(model, name), **options)
        agree(got[:3], want[:3])


@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r"])
def test_directions_are_peft_s_and_the_sizes_are_the_paper_s(direction):
    theirs, ours = Net(), Net()
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["first", "second"], "init_lora_weights": "lora_ga"}
    config = peft.LoraConfig(**options, lora_ga_config=peft.LoraGAConfig(direction=direction))
    peft_preprocess_loraga(theirs, config, stepping(theirs))
    theirs = peft.get_peft_model(theirs, config)
    config = LoraConfig(**options, lora_ga_config=LoraGAConfig(direction=direction))
    preprocess_loraga(ours, config, stepping(ours), progress=False)
    for name in ("first", "second"):
        layer, W = theirs.base_model.model.get_submodule(name), ours.get_submodule(name).weight.detach()
        A, B, *_ = ours.get_submodule(name).prepared_init["lora_ga"](W, 2, 3.0)
        S = torch.linalg.svdvals(mean_gradient(Net().double(), name))
        # rounding, there also of a randomised decomposition that needs S^9 (its four iterations), over the gap
        turn = 64 * sum(W.shape) * 2.0**-24 * S[0] / -S.diff()[:4].max()
        c, their_A, their_B = W.shape[0] ** 0.25 / 4, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        for a, b in ((A / c, their_A), (B.T / c, their_B.T / their_B.T.norm(dim=1, keepdim=True))):
            assert ((a * b).sum(1).abs() - 1).abs().max() <= turn < 0.01
        # orthonormal to the width of the decomposition, and norms of as many numbers
        close(torch.cat([A.norm(dim=1), B.norm(dim=0)]), torch.full((4,), c), terms=2 * sum(W.shape), size=c)
        which = {"ArBr": [0, 2], "A2rBr": [0, 1], "ArB2r": [2, 3]}[direction]
        assert torch.allclose(their_B.norm(dim=0), c * S[which].float(), rtol=1e-3)  # PEFT: B has the singular values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_an_adapted_model_computes_what_it_did(dtype, scale):
    model, config = Net(dtype), settings(lora_alpha=5, lora_ga_config=LoraGAConfig(scale=scale))
    x, seen = batches(dtype)[0], {}
    for name in ("first", "second"):
        keep = lambda module, args, y, name=name: seen.update({name: (args[0], y, module.weight.detach().clone())})  # noqa: E731
        model.get_submodule(name).register_forward_hook(keep)
    want = model(x)
    before = dict(seen)
    preprocess_loraga(model, config, stepping(model), progress=False)
    adapted = lora_ref.get_peft_model(model, config)
    assert not any(vars(m).get("prepared_init") for m in adapted.modules())
    assert all(layer.delta("default").norm() > 0 for layer in adapted.lora_layers().values())
    for enabled in (True, False):
        with contextlib.nullcontext() if enabled else adapted.disable_adapter():
            for name, layer in adapted.lora_layers().items():
                inputs, y, W = before[name]
                # sums over the inputs and the rank, and five roundings: R, s, the two parts, their sum
                size = W.abs() + layer.base_weight.abs() + layer.scaling["default"] * magnitude(layer)
                size = inputs.abs().double() @ size.T.double() + layer.get_base_layer().bias.abs().double()
                close(layer(inputs), y, terms=W.shape[1] + layer.r["default"] + 5, size=size)
            if dtype is torch.float64:
                agree(adapted(x), want)


def magnitude(layer) -> torch.Tensor:
    """|B| |A|"""
    A, B = layer.factors("default")
    return B.abs() @ A.abs()


def test_a_conv1d_is_the_linear_layer_with_the_transposed_array():
    factors = []
    for transposed in (False, True):
        model = Net(torch.float64)
        if transposed:
            conv = Conv1D(8, 6).double()
            conv.weight.data, conv.bias.data = model.first.weight.data.T.clone(), model.first.bias.data
            model.first = conv
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out=False, but ...
            preprocess_loraga(model, settings(), stepping(model), progress=False)
        W = model.first.weight.detach()
        factors.append(model.first.prepared_init["lora_ga"](W.T if transposed else W, 2, 0.5))
    agree(factors[0][:3], factors[1][:3])


def test_requires_grad_and_gradients_are_as_before():
    model = Net()
    loss(model, batches()[0]).backward()
    model.first.weight.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    kept = [(p, p.requires_grad, p.grad, p.grad.clone(), p.detach().clone()) for p in model.parameters()]
    wanted: list[bool] = []

    def step() -> None:
        wanted.extend(p.requires_grad for p in model.parameters())
        stepping(model, zero_grad=True)()

    with torch.no_grad():
        preprocess_loraga(model, settings(), step, progress=False)
    assert wanted == [True, False, True, False, False, False]  # the two targeted weights
    for p, requires_grad, grad, values, weight in kept:
        assert p.requires_grad is requires_grad and p.grad is grad
        assert torch.equal(grad, values) and torch.equal(p, weight)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_layers_that_share_a_weight_share_its_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    x = torch.randn(7, 4, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its weight is tied
        preprocess_loraga(
            model, settings(target_modules=["0", "2"]), lambda: model(x).square().sum().backward(), progress=False
        )
    G = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    want = lora_ga(model[0].weight.detach(), 2, gradient=G)
    for layer in (model[0], model[2]):
        got = layer.prepared_init["lora_ga"](layer.weight.detach(), 2)
        agree([got.A, got.B], [want.A, want.B])


def test_a_random_direction_follows_the_seed():
    model, config = Net(), settings(lora_ga_config=LoraGAConfig(direction="random"))
    found = []
    for seed in (0, 0, 1, 2, 3):
        torch.manual_seed(seed)
        preprocess_loraga(model, config, stepping(model), progress=False)
        found.append(model.first.prepared_init["lora_ga"](model.first.weight.detach(), 2).A)
    assert torch.equal(found[0], found[1])
    assert not all(torch.equal(found[0], other) for other in found[2:])


def fail_after_backward(model):
    stepping(model, zero_grad=True)()
    raise KeyboardInterrupt


FAULTS = {
    "another init": (Net, {"init_lora_weights": True}, fail_after_backward, ValueError, "this prepares for 'lora_ga'"),
    "the step fails": (Net, {}, fail_after_backward, KeyboardInterrupt, None),
    "r too large": (Net, {"rank_pattern": {"second": 3}}, fail_after_backward, ValueError, "second: .* = 5, r=3"),
    "alpha 0": (Net, {"lora_alpha": 0}, fail_after_backward, ValueError, "first: .*lora_alpha must be > 0"),
    "a norm": (Net, {"target_modules": ["norm"]}, fail_after_backward, ValueError, "norm: LayerNorm cannot be adapted"),
    "an embedding": (
        lambda: nn.Sequential(nn.Embedding(6, 6)),
        {"target_modules": ["0"]},
        fail_after_backward,
        ValueError,
        "0: .*not available for embedding layers",
    ),
    "no gradient": (
        Net,
        {},
        lambda model: model.first(batches()[0]).sum().backward(),
        ValueError,
        "second: got no gradient",
    ),
    "a zero gradient": (
        Net,
        {},
        lambda model: (0 * model(batches()[0])).sum().backward(),
        ValueError,
        "first: the gradient is zero",
    ),
    "an infinite gradient": (
        Net,
        {},
        lambda model: (math.inf * model(batches()[0])).sum().backward(),
        ValueError,
        "first: .*not finite",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_fails_leaves_the_model_as_it_was(fault):
    make, options, step, error, message = FAULTS[fault]
    model = make()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [(p, p.requires_grad, p.grad, p.grad.clone(), p.detach().clone()) for p in model.parameters()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    with pytest.raises(error, match=message):
        preprocess_loraga(model, settings(**options), lambda: step(model), progress=False)
    assert attributes == [sorted(vars(m)) for m in model.modules()]
    for p, requires_grad, grad, values, weight in before:
        assert p.requires_grad is requires_grad and p.grad is grad
        assert torch.equal(grad, values) and torch.equal(p, weight)
        assert not p._post_accumulate_grad_hooks
