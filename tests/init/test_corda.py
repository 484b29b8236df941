"""CorDA: the formula, what it leaves alone, PEFT's numbers, and the run over data before it."""

import contextlib
import copy
import itertools
import math
import pickle

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import Snapshot
from peft.tuners.lora.corda import collect_eigens_for_layer
from peft.tuners.lora.corda import preprocess_corda as peft_preprocess_corda
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_ref
from lora_ref import CordaConfig, LoraConfig
from lora_ref.calibration.preprocess import preprocess_corda
from lora_ref.init import corda as method
from lora_ref.init.corda import call_covariance, corda, damp, output_directions
from spec_tests import agree, close

SHAPES = [(1, 5), (5, 1), (4, 4), (3, 7), (8, 3), (12, 16)]
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def weight_of(kind: str, n_out: int, n_in: int, rng: np.random.Generator) -> np.ndarray:
    """A weight of unit size with this spectrum."""
    m = min(n_out, n_in)
    S = {
        "decaying": 2.0 ** -np.arange(m),
        "flat": np.ones(m),
        "rank one": np.eye(m)[0],
        "zero": np.zeros(m),
    }[kind]
    U, V = (np.linalg.qr(rng.normal(size=(n, m)))[0] for n in (n_out, n_in))
    return U * S @ V.T


def inputs_of(kind: str, n_in: int, rng: np.random.Generator) -> np.ndarray:
    """Inputs (tokens, in): more tokens than entries, fewer, or nearly all of the energy in one direction."""
    x = rng.normal(size=(2 if kind == "few" else 3 * n_in, n_in))
    return x + 30 * rng.normal(size=n_in) if kind == "outlier" else x


@st.composite
def problems(draw):
    """(W, C', r, method, rng), all in float64."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_out, n_in = draw(st.sampled_from(SHAPES))
    W = weight_of(draw(st.sampled_from(["decaying", "flat", "rank one", "zero"])), n_out, n_in, rng)
    C = call_covariance(inputs_of(draw(st.sampled_from(["many", "few", "outlier"])), n_in, rng))
    return W, C, draw(st.integers(1, min(n_out, n_in))), draw(st.sampled_from(["ipm", "kpm"]))


scalings = st.floats(0.01, 100.0)
libraries = st.sampled_from([np.asarray, torch.from_numpy])


@given(problems(), scalings, libraries)
def test_the_update_is_the_formula_with_the_inverse(problem, s, library):
    W, C, r, mode = problem
    A, B, R, exact = corda(library(W), r, s, covariance=library(C), corda_method=mode)
    A, B, R = (np.asarray(x) for x in (A, B, R))
    assert A.shape == (r, W.shape[1]) and B.shape == (W.shape[0], r) and R.shape == W.shape and exact
    D = C + 0.01 * np.trace(C) / len(C) * np.eye(len(C))
    G, u, n = W @ D, 2.0**-53, sum(W.shape)
    U, S = (np.asarray(x) for x in output_directions(library(W), library(D), r, mode))
    size, condition = np.linalg.norm(W), np.linalg.cond(D)
    # U_r S_r V_r^T C'^-1, with the inverse that the code does without; U_r^T G = S_r V_r^T
    with_inverse = U @ (U.T @ G) @ np.linalg.inv(D)
    assert abs(s * B @ A - with_inverse).max() <= 8 * n * u * condition * size
    # U_r is orthonormal and holds as much (or as little) of W C' as any r directions can: Ky Fan
    assert abs(U.T @ U - np.eye(r)).max() <= 8 * n * u
    every = np.linalg.svd(G)[1]
    best = every[:r] if mode == "ipm" else every[len(every) - r :]
    assert abs((S**2).sum() - (best**2).sum()) <= 8 * n * u * every[0] ** 2
    assert abs(np.sort(S)[::-1] - best).max() <= 8 * n * u * every[0]
    # columns of B: orthogonal, |B_k|^2 = S_k / s
    assert abs(B.T @ B - np.diag(S) / s).max() <= 8 * n * u * max(S.max(), 1e-300) / s
    # nothing is lost, and the sign is the rule's
    assert (abs(R + s * B @ A - W) <= 4 * (r + 2) * u * (abs(W) + s * abs(B) @ abs(A))).all()
    assert all(row[abs(row).argmax()] >= 0 for row in A)


@given(problems(), scalings)
def test_the_update_does_not_depend_on_alpha_nor_on_the_size_of_the_covariance(problem, s):
    W, C, r, mode = problem
    A, B, R, _ = corda(W, r, s, covariance=C, corda_method=mode)
    A1, B1, R1, _ = corda(W, r, 1.0, covariance=4 * C, corda_method=mode)  # 4: no rounding
    bound = 8 * (r + 4) * 2.0**-53 * (abs(W) + s * abs(B) @ abs(A))
    assert (abs(s * B @ A - B1 @ A1) <= bound).all()
    assert (abs(R - R1) <= bound).all()


def test_by_hand():
    # W C' = diag(3 (1 + d), 2 (9 + d)) with d = .01 * 5: the second output comes first
    A, B, R, _ = corda(np.diag([3.0, 2.0]), 1, 0.5, covariance=np.diag([1.0, 9.0]))
    S = 2 * 9.05
    b, a = math.sqrt(S / 0.5), 2 / math.sqrt(S * 0.5)
    # d: 4; W C': 2; vectors of a 2x2 matrix over a gap of 1 - 3.15 / 18.1: 5; a norm, two roots, a product: 5
    close(B, np.array([[0], [b]]), terms=16, size=b)
    close(A, np.array([[0, a]]), terms=16, size=a)
    close(R, np.array([[3.0, 0], [0, 0]]), terms=34, size=4)  # both of them, s, and the difference
    A, B, R, _ = corda(np.diag([3.0, 2.0]), 1, 0.5, covariance=np.diag([1.0, 9.0]), corda_method="kpm")
    close(R, np.array([[0, 0], [0, 2.0]]), terms=34, size=6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@given(st.integers(0, 2**32 - 1), st.sampled_from(SHAPES), st.sampled_from([0.25, 1.0, 3.0]))
def test_lower_precisions_follow_float64(dtype, mode, seed, shape, s):
    rng, r = np.random.default_rng(seed), max(1, min(shape) // 2)
    C = call_covariance(inputs_of("many", shape[1], rng))
    D = damp(C)
    # singular values of W C': 1, 1/2, 1/4, ...
    W = torch.from_numpy(weight_of("decaying", *shape, rng) @ np.linalg.inv(D)).to(dtype)
    W64 = W.double().numpy()
    A, B, R, _ = corda(W, r, s, covariance=torch.from_numpy(C), corda_method=mode)
    assert A.dtype == B.dtype == R.dtype == dtype
    u, half = UNIT[torch.float32], UNIT[dtype]
    update = s * B.double() @ A.double()
    # whatever the rounding of the factors: base and update give W, to the rounding of the base
    bound = half * (R.double().abs() + W.double().abs()) + 4 * (r + 2) * u * (
        W.double().abs() + s * B.double().abs() @ A.double().abs()
    )
    if dtype is torch.float16:
        bound += 2.0**-24  # its smallest number
    assert ((R.double() + update - W.double()).abs() <= bound).all()
    # the update: U_r turns by (rounding of W C') / gap, then A and B are rounded
    A64, B64, *_ = corda(W64, r, s, covariance=C, corda_method=mode)
    every = np.append(np.linalg.svd(W64 @ D)[1], 0.0)
    split = r if mode == "ipm" else min(shape) - r
    if 0 < split < min(shape):
        turn = sum(shape) * u * np.linalg.norm(W64) * np.linalg.norm(D) / (every[split - 1] - every[split])
        bound = 4 * turn * np.linalg.norm(W64) + 4 * half * (s * abs(B64) @ abs(A64)).max() + 2.0**-20
        assert abs(update.numpy() - s * B64 @ A64).max() <= bound


def test_a_covariance_that_says_nothing_and_options_out_of_range_are_errors():
    W, C = np.eye(3, 4), np.eye(4)
    for bad in (0 * C, C + np.nan, C + np.inf):
        with pytest.raises(ValueError, match="zero, or not finite"):
            corda(W, 1, covariance=bad)
    with pytest.raises(ValueError, match=r"r <= min\(in, out\) = 3, r=4"):
        corda(W, 4, covariance=C)
    with pytest.raises(ValueError, match="lora_alpha must be > 0"):
        corda(W, 1, 0.0, covariance=C)
    with pytest.raises(ValueError, match="'ipm' or 'kpm'"):
        corda(W, 1, covariance=C, corda_method="imp")


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([(), (1,), (3,), (2, 3)]), libraries)
def test_a_call_adds_the_second_moment_of_its_normalised_tokens(seed, negative, batch, library):
    x = np.random.default_rng(seed).normal(size=(*batch, 4))
    x = -abs(x) if negative else x
    rows = x.reshape(-1, 4) / abs(x).max()
    want = sum(np.outer(row, row) for row in rows)
    assert abs(np.asarray(call_covariance(library(x))) - want).max() <= 8 * len(rows) * 2.0**-53 * len(rows)
    assert not np.asarray(call_covariance(library(0 * x))).any()


@given(st.integers(0, 2**32 - 1), st.sampled_from(["many", "few", "outlier"]), st.integers(1, 40), libraries)
def test_the_damping_is_one_hundredth_of_the_mean_variance_in_float64(seed, kind, n, library):
    C = call_covariance(inputs_of(kind, n, np.random.default_rng(seed)))
    want = C + 0.01 * np.trace(C) / n * np.eye(n)
    close(damp(library(C)), want, terms=n + 3, size=want)  # the trace, divided, times 0.01, added


def dampings(C: torch.Tensor, probe: torch.Tensor) -> tuple[float, float]:
    """The damping that this library takes and the one that PEFT takes, for a probe with |probe C| = 0, |probe| = 1.

    With the weight `probe` (1, in), W C' is d * mean(diag C) * probe, whose singular value shows d.
    """
    layer = nn.Linear(len(C), 1, bias=False)
    layer.weight.data, layer.covariance_matrix = probe[None].clone(), C.clone()
    mean = C.diagonal().mean().item()
    ours = (probe @ (damp(C) @ probe)).item() / mean
    return ours, collect_eigens_for_layer(layer, None).S_WC.item() / mean


# the first damping at which float32's rounding lets the inverse pass: at 2200 that differs from processor to processor
@pytest.mark.parametrize(("n", "want"), [(8, [0.01]), (300, [0.01]), (2200, [0.02, 0.04])])
def test_the_damping_is_peft_s_where_float32_cannot_invert_the_covariance(n, want):
    v = torch.randn(n, generator=torch.Generator().manual_seed(n))
    probe = torch.zeros(n)
    probe[0], probe[1] = v[1], -v[0]
    ours, pefts = dampings(torch.outer(v, v), probe / probe.norm())
    assert any(ours == pytest.approx(x, rel=0.05) for x in want)  # neighbours are a factor of 2 apart
    assert pefts == pytest.approx(ours, rel=0.05)


@pytest.mark.parametrize("kind", ["rank one", "few", "decaying", "outlier"])
def test_what_the_damping_takes_for_granted_of_float32(kind):
    """The error of the inverse stays below 10 u ||C'||_F ||C'^-1||_2 and is halved when the damping doubles."""
    g, n = torch.Generator().manual_seed(0), 400
    x = {
        "rank one": lambda: torch.randn(1, n, generator=g),
        "few": lambda: torch.randn(8, n, generator=g),
        "decaying": lambda: torch.randn(n, n, generator=g) / torch.arange(1, n + 1) @ torch.randn(n, n, generator=g),
        "outlier": lambda: torch.randn(n, n, generator=g) + 30 * torch.randn(n, generator=g),
    }[kind]()
    C, errors = call_covariance(x), []
    for damping in (0.01, 0.02, 0.04):
        D = C + damping * C.diagonal().mean() * torch.eye(n)
        errors.append(torch.dist(D @ torch.linalg.inv(D), torch.eye(n)).item())
        assert errors[-1] < 10 * 2.0**-24 * D.norm() / (damping * C.diagonal().mean())
    for worse, better in itertools.pairwise(errors):
        assert 1.5 < worse / better < 2.7


# -- models ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three layers that get one tensor, one that gets another."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(6, 8, dtype=dtype) for _ in range(3))
        self.out = nn.Linear(8, 5, dtype=dtype)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.dropout(self.q(x) * self.k(x) + self.v(x)).relu())


def batches(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    # the largest entry is positive: PEFT divides by |max x|, the statement says max |x|
    return [torch.rand(tokens, 6, generator=g).to(dtype) for tokens in (20, 3, 11)]


def running(model: nn.Module, data: list[torch.Tensor]):
    def run() -> None:
        for x in data:
            model(x)

    return run


def settings(**kwargs) -> LoraConfig:
    kwargs = {"r": 2, "target_modules": ["q", "k", "v", "out"], "init_lora_weights": "corda"} | kwargs
    return LoraConfig(**kwargs)


def prepared(model: nn.Module, config: LoraConfig, data: list[torch.Tensor] | None = None, **kwargs) -> nn.Module:
    run = running(model, batches(next(model.parameters()).dtype) if data is None else data)
    preprocess_corda(model, config, run, progress=False, **kwargs)
    return model


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("alpha", [2, 7])
def test_products_and_residuals_are_peft_s(mode, alpha):
    data, options = batches(), {"r": 2, "lora_alpha": alpha, "rank_pattern": {"v": 3}, "init_lora_weights": "corda"}
    options["target_modules"] = ["q", "k", "v", "out"]
    theirs, ours = Attention(), Attention()
    original = Attention()
    config = peft.LoraConfig(**options, corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode))
    peft_preprocess_corda(theirs, config, run_model=running(theirs, data))
    theirs = peft.get_peft_model(theirs, config)
    config = LoraConfig(**options, corda_config=CordaConfig(mode))
    prepared(ours, config, data)
    for name in ("q", "k", "v", "out"):
        layer = theirs.base_model.model.get_submodule(name)
        r, s = layer.r["default"], layer.scaling["default"]
        want = s * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
        W = original.get_submodule(name).weight.detach()
        A, B, R, _ = ours.get_submodule(name).prepared_init["corda"](W, r, s)
        x = data if name != "out" else [hidden(original, x) for x in data]
        D = damp(sum(call_covariance(x.detach().double()) for x in x) / len(x))
        every = torch.linalg.svdvals(W.double() @ D)
        split = r if mode == "ipm" else len(every) - r
        gap = (every[split - 1] - every[split]).item()
        u, n, size = 2.0**-24, sum(W.shape), W.norm().item()
        # theirs and ours: U_r turns by rounding / gap; theirs also has the rounding of the inverse
        bound = 4 * n * u * size * (D.norm().item() * size / gap + torch.linalg.cond(D).item())
        assert bound < 0.05 * want.norm()
        assert torch.dist(s * B @ A, want) <= bound
        assert torch.dist(R, layer.base_layer.weight) <= bound


def hidden(model: Attention, x: torch.Tensor) -> torch.Tensor:
    return (model.q(x) * model.k(x) + model.v(x)).relu()


def test_the_run_and_the_pure_function_are_one_formula():
    model, data = prepared(Attention(torch.float64), settings()), batches(torch.float64)
    C = sum(call_covariance(x) for x in data) / 3
    W = model.k.weight.detach()
    got, want = model.k.prepared_init["corda"](W, 2, 3.0), corda(W, 2, 3.0, covariance=C)
    agree(got[:3], want[:3])
    assert got[3] is want[3] is True


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_adapted_model_computes_what_it_did(dtype):
    model, x = prepared(Attention(dtype), settings(lora_alpha=5)).eval(), batches(dtype)[0]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = dict.fromkeys(("q", "k", "v"), x) | {"out": hidden(model, x)}
    before = {name: (given, model.get_submodule(name)(given)) for name, given in inputs.items()}
    want = model(x)
    adapted = lora_ref.get_peft_model(model, settings(lora_alpha=5))
    assert not any("prepared_init" in vars(m) and m.prepared_init for m in adapted.modules())
    for name, layer in adapted.layers().items():
        W = weights[f"{name}.weight"]
        D = layer.delta("default")
        assert D.norm() > 0.1 * W.norm()
        error = (layer.base_weight.double() + D.double() - W.double()).abs()
        assert (error <= 2 * UNIT[dtype] * (W.abs() + layer.base_weight.abs()) + 8 * UNIT[torch.float32]).all()
    for enabled in (True, False):
        with contextlib.nullcontext() if enabled else adapted.disable_adapter():
            for name, layer in adapted.layers().items():
                (given, y), W, (A, B) = before[name], weights[f"{name}.weight"], layer.factors("default")
                # sums over the inputs and the rank, and five roundings: R, s, the two parts, their sum
                size = W.abs() + layer.base_weight.abs() + layer.scaling["default"] * B.abs() @ A.abs()
                size = given.abs().double() @ size.T.double() + weights[f"{name}.bias"].abs().double()
                close(layer(given), y, terms=W.shape[1] + layer.r["default"] + 5, size=size)
            if dtype is torch.float64:
                agree(adapted(x), want)


def test_without_the_run_over_data_the_error_says_so():
    with pytest.raises(ValueError, match="preprocess_corda"):
        lora_ref.get_peft_model(Attention(), settings())


@pytest.mark.parametrize(
    "targets", [["q", "k", "v", "out"], "q|k|v|out", "all-linear", ["q", "out"]], ids=["list", "regex", "all", "some"]
)
def test_every_form_of_target_and_each_layer_s_own_rank(targets):
    model = prepared(Attention(), settings(target_modules=targets, rank_pattern={"out": 4}, lora_alpha=3))
    names = {"q", "out"} if targets == ["q", "out"] else {"q", "k", "v", "out"}
    found = {name: m.prepared_init["corda"] for name, m in model.named_modules() if hasattr(m, "prepared_init")}
    assert {name: init.r for name, init in found.items()} == {n: 4 if n == "out" else 2 for n in names}


def test_a_conv1d_is_the_linear_layer_with_the_transposed_array():
    linear, conv = nn.Sequential(nn.Linear(6, 4)).double(), nn.Sequential(Conv1D(4, 6)).double()
    conv[0].weight.data, conv[0].bias.data = linear[0].weight.data.T.clone(), linear[0].bias.data.clone()
    factors = []
    for model in (linear, conv):
        prepared(model, settings(target_modules=["0"]))
        W = model[0].weight.detach()
        factors.append(model[0].prepared_init["corda"](W.T if model is conv else W, 2, 0.5))
    agree(factors[0][:3], factors[1][:3])
    assert factors[0][3] is factors[1][3] is True


def test_layers_with_the_same_input_share_the_work_and_the_rest_does_not(monkeypatch):
    calls = []

    def counted(x):
        calls.append(x)
        return call_covariance(x)

    monkeypatch.setattr("lora_ref.calibration.covariance.call_covariance", counted)
    model = prepared(Attention(), settings())
    assert len(calls) == 6  # three batches; q, k and v share theirs, out has its own
    alone = prepared(Attention(), settings(target_modules=["v"]))
    for key in ("U", "S"):
        assert torch.equal(*(m.v.prepared_init["corda"].start.keywords[key] for m in (model, alone)))


class Wayward(nn.Module):
    """Layers that share some of their inputs, in all the ways that could be mistaken for sharing all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.a, self.b, self.c = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(3))

    def forward(self, x: torch.Tensor, step: int) -> None:
        x = x.clone()
        self.a(x)
        if step == 1:
            self.b(x * 2 - 1)  # another tensor this time
            self.c(x)
        else:
            self.b(x)
            x[0, :] = 1.5  # the same tensor, changed in place
            self.c(x)
        if step == 2:
            self.a(x)  # twice in one forward


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_that_only_look_shared_are_told_apart(mode):
    model, seen = Wayward(), {"a": [], "b": [], "c": []}
    for name, layer in model.named_children():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].clone()))
    data = [torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def run() -> None:
        with mode():
            for step, x in enumerate(data):
                model(x, step)

    preprocess_corda(model, settings(target_modules=["a", "b", "c"]), run, progress=False)
    for name, layer in model.named_children():
        D = damp(sum(map(call_covariance, seen[name])) / len(seen[name]))
        U, S = output_directions(layer.weight.detach(), D, 2)
        got = layer.prepared_init["corda"].start.keywords
        agree(got["S"], S)
        agree(got["U"] @ got["U"].T, U @ U.T)


def test_autocast_around_the_run_does_not_round_the_covariance():
    plain, cast = (
        prepared(nn.Sequential(nn.Linear(6, 4)), settings(target_modules=["0"])),
        nn.Sequential(nn.Linear(6, 4)),
    )
    cast.load_state_dict(plain.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        prepared(cast, settings(target_modules=["0"]))
    a, b = (m[0].prepared_init["corda"].start.keywords for m in (plain, cast))
    assert torch.equal(a["U"], b["U"]) and torch.equal(a["S"], b["S"])


def test_modes_gradients_and_hooks_are_as_before_and_the_run_is_in_eval_mode():
    model, modes = Attention().train(), []
    model.k.eval()
    model.q.weight.requires_grad_(False)
    before = [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def run() -> None:
        modes.append((any(m.training for m in model.modules()), model(batches()[0]).requires_grad))

    preprocess_corda(model, settings(), run, progress=False)
    assert modes == [(False, False)]
    assert before == [(m.training, len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(p.requires_grad is wants and p.grad is grad for p, wants, grad in kept)


def test_nothing_but_the_directions_is_kept_and_it_can_be_copied():
    model = prepared(Attention(), settings())
    numbers = [
        t.untyped_storage().nbytes() // 4
        for m in model.children()
        if hasattr(m, "prepared_init")
        for t in m.prepared_init["corda"].start.keywords.values()
    ]
    assert numbers == [16, 2] * 3 + [10, 2]  # r * out, r
    W = model.q.weight.detach()
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = clone.q.prepared_init["corda"](W, 2, 1.0)
        assert torch.equal(again.A, model.q.prepared_init["corda"](W, 2, 1.0).A)
    with pytest.raises(ValueError, match=r"prepared for a weight \(8, 6\) and r=2, not for \(8, 6\) and r=3"):
        model.q.prepared_init["corda"](W, 3, 1.0)
    with pytest.raises(ValueError, match=r"not for \(6, 8\) and r=2"):
        model.q.prepared_init["corda"](W.T, 2, 1.0)


def test_the_same_data_give_the_same_directions():
    a, b = (prepared(Attention(), settings()) for _ in range(2))
    assert torch.equal(
        a.out.prepared_init["corda"].start.keywords["U"], b.out.prepared_init["corda"].start.keywords["U"]
    )


def test_another_copy_of_the_model_can_do_the_running():
    model, runner = Attention(), Attention(torch.float64)
    runner.load_state_dict(model.state_dict())
    preprocess_corda(model, settings(), running(runner, batches(torch.float64)), hooked_model=runner, progress=False)
    W, C = (runner.out.weight.detach(), sum(call_covariance(hidden(runner, x)) for x in batches(torch.float64)) / 3)
    want = output_directions(W, damp(C), 2)[1]
    # a singular value is off by no more than W C' is: by the rounding of C', the product and the decomposition
    size = W.norm() * damp(C).norm()
    close(model.out.prepared_init["corda"].start.keywords["S"], want, terms=2 * sum(W.shape), size=size)
    assert not any(hasattr(m, "prepared_init") for m in runner.modules())
    with pytest.raises(ValueError, match="q: hooked_model has no module"):
        preprocess_corda(Attention(), settings(), print, hooked_model=nn.Sequential(), progress=False)


def run_and_fail(model):
    model(batches()[0])
    raise KeyboardInterrupt


FAULTS = {
    "no run_model": (Attention, {}, None, ValueError, "run_model is None"),
    "another init": (
        Attention,
        {"init_lora_weights": "gaussian"},
        run_and_fail,
        ValueError,
        "'gaussian': this prepares",
    ),
    "the run fails": (Attention, {}, run_and_fail, KeyboardInterrupt, None),
    "r too large": (Attention, {"rank_pattern": {"out": 6}}, run_and_fail, ValueError, r"out: .* = 5, r=6"),
    "alpha 0": (Attention, {"alpha_pattern": {"v": 0}}, run_and_fail, ValueError, "v: .*lora_alpha must be > 0"),
    "an embedding": (
        lambda: nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6)),
        {"target_modules": ["0", "1"]},
        run_and_fail,
        ValueError,
        "0: .*'corda' is not available for embedding",
    ),
    "a convolution": (
        lambda: nn.Sequential(nn.Conv1d(6, 6, 1)),
        {"target_modules": ["0"]},
        run_and_fail,
        ValueError,
        "0: .*not available for conv layers",
    ),
    "a parameter": (
        lambda: nn.Sequential(nn.Linear(6, 6)),
        {"target_modules": None, "target_parameters": ["0.weight"]},
        run_and_fail,
        ValueError,
        "0.weight: .*not available for parameter layers",
    ),
    "no input": (Attention, {}, lambda model: model.q(batches()[0]), ValueError, "k: the layer got no input"),
    "zeros": (Attention, {}, lambda model: model(0 * batches()[0]), ValueError, "q: .*zero, or not finite"),
    "no tokens": (Attention, {}, lambda model: model(torch.zeros(0, 6)), ValueError, "q: .*zero, or not finite"),
    "nan": (Attention, {}, lambda model: model(batches()[0] / 0 * 0), ValueError, "q: .*zero, or not finite"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_that_fails_leaves_the_model_as_it_was(fault):
    make, options, run, error, message = FAULTS[fault]
    model = make()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        preprocess_corda(model, settings(**options), run and (lambda: run(model)), progress=False)
    assert Snapshot(model) == before


def test_an_adapted_model_is_refused():
    model = lora_ref.get_peft_model(Attention(), LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(ValueError, match="adapted already"):
        preprocess_corda(model, settings(), lambda: None, progress=False)


def test_a_progress_bar_on_stderr(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    preprocess_corda(model := Attention(), settings(), running(model, batches()))
    out, err = capsys.readouterr()
    assert out == "" and "CorDA" in err
    prepared(Attention(), settings())
    assert capsys.readouterr() == ("", "")


def test_ipm_beats_kpm_at_what_it_is_for():
    """The update that "ipm" takes out moves the outputs on the data most, that of "kpm" least."""
    torch.manual_seed(0)
    W, x = torch.randn(20, 30, dtype=torch.float64), torch.randn(200, 30, dtype=torch.float64) * torch.arange(1, 31)
    moved = {}
    for mode in ("ipm", "kpm"):
        A, B, *_ = method.corda(W, 4, covariance=call_covariance(x), corda_method=mode)
        moved[mode] = torch.linalg.norm(x @ (B @ A).T) / torch.linalg.norm(x @ W.T)
    assert moved["kpm"] < 0.5 * (4 / 20) ** 0.5 < (4 / 20) ** 0.5 < moved["ipm"]
