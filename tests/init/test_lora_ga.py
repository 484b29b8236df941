"""LoRA-GA: which singular directions of the gradient go where, and how the gradient is found."""

import contextlib
import math
import warnings

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.loraga import preprocess_loraga as peft_preprocess_loraga
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_ref
from lora_ref import LoraConfig
from lora_ref.calibration.preprocess import preprocess_loraga
from lora_ref.init.lora_ga import lora_ga
from lora_ref.init.options import LoraGAConfig
from spec_tests import agree, close

SHAPES = [(2, 5), (5, 2), (4, 4), (3, 7), (8, 6), (12, 16)]
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DIRECTIONS = ["ArBr", "A2rBr", "ArB2r", "random"]
SCALES = ["stable", "weight_svd", "gd_scale", "unit"]


@st.composite
def problems(draw):
    """(W, G, r, U, V): a weight, and a gradient of singular values 1, 1/2, 1/4, ... with its vectors, in float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_out, n_in = draw(st.sampled_from(SHAPES))
    m = min(n_out, n_in)
    U, V = (np.linalg.qr(rng.normal(size=(n, m)))[0] for n in (n_out, n_in))
    G = U * 2.0 ** -np.arange(m) @ V.T
    return rng.normal(size=(n_out, n_in)), G, draw(st.integers(1, m // 2)), U, V


scalings = st.floats(0.01, 100.0)
libraries = st.sampled_from([np.asarray, torch.from_numpy])


def seeded(library, seed=0):
    return np.random.default_rng(seed) if library is np.asarray else torch.Generator().manual_seed(seed)


@given(problems(), scalings, libraries, st.sampled_from(DIRECTIONS), st.sampled_from(SCALES), st.floats(0.5, 64))
def test_factors_lie_along_singular_vectors_of_the_gradient(problem, s, library, direction, scale, gamma):
    W, G, r, U, V = problem
    factors = lora_ga(
        library(W), r, s, seeded(library), gradient=library(G), direction=direction, scale=scale, stable_gamma=gamma
    )
    A, B, R = (np.asarray(x) for x in factors[:3])
    size = {
        "stable": W.shape[0] ** 0.25 / gamma**0.5,
        "gd_scale": 1 / s,
        "unit": 1.0,
        "weight_svd": np.sqrt(np.linalg.svd(W)[1][:r] / s).mean(),
    }[scale]
    u, n = 2.0**-53, sum(W.shape)
    turn = 16 * n * u * 2.0 ** (2 * r)  # rounding of G / the smallest gap among the first 2r singular values
    along_A, along_B = abs(A @ V), abs(U.T @ B).T  # (r, m): how much of each singular vector there is in each row
    a, b = along_A.argmax(1), along_B.argmax(1)
    assert abs(along_A[range(r), a] / size - 1).max() <= turn
    assert abs(along_B[range(r), b] / size - 1).max() <= turn
    assert (A[range(r), abs(A).argmax(1)] > 0).all()  # the sign is the rule's, and B's goes with it
    want = {"ArB2r": (0, r, 1), "A2rBr": (r, 0, 1), "ArBr": (1, 0, 2)}
    if direction in want:
        first_a, first_b, step = want[direction]
        assert list(a) == list(range(first_a, first_a + r * step, step))
        assert list(b) == list(range(first_b, first_b + r * step, step))
    assert sorted([*a, *b]) == list(range(2 * r))
    assert (abs(R + s * B @ A - W) <= 4 * (r + 2) * u * (abs(W) + s * abs(B) @ abs(A))).all()


@given(problems(), scalings, libraries, st.sampled_from(DIRECTIONS))
def test_the_first_step_of_gd_scale_is_full_training_s_projected_on_2r_triples(problem, s, library, direction):
    W, G, r, U, V = problem
    A, B, *_ = lora_ga(library(W), r, s, seeded(library), gradient=library(G), direction=direction, scale="gd_scale")
    A, B = np.asarray(A), np.asarray(B)
    # the gradients of A and B are s B^T G and s G A^T
    step = s * (B @ (s * B.T @ G) + (s * G @ A.T) @ A)
    best = U[:, : 2 * r] * 2.0 ** -np.arange(2 * r) @ V[:, : 2 * r].T
    assert abs(step - best).max() <= 32 * sum(W.shape) * 2.0**-53 * 2.0 ** (2 * r)


def test_by_hand():
    # out^(1/4) / sqrt(gamma) = 2^(1/4) / 2
    A, B, R, exact = lora_ga(np.eye(2), 1, 2.0, gradient=np.diag([5.0, -1.0]), stable_gamma=4)
    c = 2**0.25 / 2
    # singular vectors of 2 + 2 roundings over a gap of 1 - 1/5, and c; two of them, s, and two sums in R
    close(A, np.array([[c, 0]]), terms=8, size=c)
    close(B, np.array([[0], [-c]]), terms=8, size=c)
    close(R, np.array([[1, 0], [2 * c * c, 1]]), terms=19, size=1 + 2 * c * c)
    assert exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(problems(), st.sampled_from([0.25, 1.0, 3.0]))
def test_lower_precisions_follow_float64(dtype, problem, s):
    W, G, r, *_ = problem
    W, G = (torch.from_numpy(x).to(dtype) for x in (W, G))
    got = lora_ga(W, r, s, gradient=G)
    want = lora_ga(W.double(), r, s, gradient=G.double())
    assert got.A.dtype == got.B.dtype == got.residual.dtype == dtype
    half, u = UNIT[dtype], UNIT[torch.float32]
    S = torch.linalg.svdvals(G.double())
    gaps = -S.diff()[: 2 * r].min() if 2 * r < len(S) else torch.minimum(-S.diff().min(), S[-1])
    turn = 16 * sum(W.shape) * u * S[0] / gaps
    for a, b in zip(got[:2], want[:2], strict=True):
        sign = torch.sign((a.double() * b).sum())  # the largest entry may be another one after rounding
        if r == 1:
            assert (sign * a.double() - b).abs().max() <= (turn + 2 * half) * b.norm()
    D, D64 = s * got.B.double() @ got.A.double(), s * want.B @ want.A
    assert (D - D64).abs().max() <= 2 * s * (turn + 2 * half) * want.B.norm() * want.A.norm() if r == 1 else True
    size = got.residual.double().abs() + W.double().abs()
    bound = half * size + 4 * (r + 2) * u * (W.double().abs() + s * got.B.double().abs() @ got.A.double().abs())
    assert ((got.residual.double() + D - W.double()).abs() <= bound + (dtype is torch.float16) * 2.0**-24).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 2}, r"2r <= min\(in, out\) = 3, r=2"),
        ({"r": 4}, r"r <= min\(in, out\) = 3, r=4"),
        ({"scaling": 0.0}, "lora_alpha must be > 0"),
        ({"direction": "BrA2r"}, "direction='BrA2r': must be one of 'ArBr'"),
        ({"scale": "gd"}, "scale='gd': must be one of 'stable'"),
        ({"stable_gamma": 0}, "stable_gamma=0: must be > 0"),
        ({"gradient": np.zeros((3, 5))}, "the gradient is zero"),
        ({"gradient": np.full((3, 5), np.nan)}, "not finite"),
        ({"gradient": np.full((3, 5), np.inf)}, "not finite"),
    ],
)
def test_what_cannot_be_done_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        lora_ga(np.ones((3, 5)), **({"r": 1, "gradient": np.ones((3, 5))} | options))


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_goes_by_its_letters(scale):
    """A string read from a file is equal to the name in the code, and another object."""
    W, G = np.eye(6, 5), np.eye(6, 5)[::-1]
    made, want = (lora_ga(W, r=1, scaling=2.0, gradient=G, scale=name) for name in ("".join(list(scale)), scale))
    assert (made.A == want.A).all() and (made.B == want.B).all()


# -- models ------------------------------------------------------------------------------------


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
@pytest.mark.parametrize("scale", SCALES)
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
    assert all(layer.delta("default").norm() > 0 for layer in adapted.layers().values())
    for enabled in (True, False):
        with contextlib.nullcontext() if enabled else adapted.disable_adapter():
            for name, layer in adapted.layers().items():
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
