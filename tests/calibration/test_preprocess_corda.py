"""`preprocess_corda`: the run over data before CorDA, and the model that starts from it."""

import contextlib
import copy
import pickle

import peft
import pytest
import torch
from models import Snapshot
from peft.tuners.lora.corda import preprocess_corda as peft_preprocess_corda
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_ref
from lora_ref import CordaConfig, LoraConfig
from lora_ref.calibration.preprocess import preprocess_corda
from lora_ref.init.corda import call_covariance, corda, damp, output_directions
from spec_tests import agree, close
from spec_tests.rounding import unit


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
    for name, layer in adapted.lora_layers().items():
        W = weights[f"{name}.weight"]
        D = layer.delta("default")
        assert D.norm() > 0.1 * W.norm()
        residual = layer.stored(layer.residual("default"))
        error = (residual.double() + D.double() - W.double()).abs()
        assert (error <= 2 * unit(dtype) * (W.abs() + residual.abs()) + 8 * unit(torch.float32)).all()
    for enabled in (True, False):
        with contextlib.nullcontext() if enabled else adapted.disable_adapter():
            for name, layer in adapted.lora_layers().items():
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

    monkeypatch.setattr("lora_ref.calibration.hooks.call_covariance", counted)
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
