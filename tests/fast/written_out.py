"""Adapted layers of six kinds, and their formula in torch's own functions.

    y = base(x) + sum over the adapters of s B(A(dropout(x)))

`formula` reads the parameters and calls no module of the layer, so that a fault of the layer cannot be in it.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from transformers.pytorch_utils import Conv1D

import lora_ref
from spec_tests import agree, close, distance
from spec_tests.rounding import UNIT, unit

N_IN, N_OUT, VOCABULARY, N_EXPERTS, BATCH = 6, 5, 7, 3, 4
RANKS, ALPHAS = {"default": 2, "other": 3}, {"default": 3, "other": 6}

Function = Callable[[Tensor], Tensor]


class Matrix(nn.Module):
    """A raw parameter (out, in)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N_OUT, N_IN))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Experts(nn.Module):
    """A raw stack of matrices (experts, out, in), whose outputs are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(N_EXPERTS, N_OUT, N_IN))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.weight)


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(N_IN, N_OUT),
    "conv1d": lambda: Conv1D(N_OUT, N_IN),
    "conv2d": lambda: nn.Conv2d(3, N_OUT, 2, stride=2, padding=1),
    "embedding": lambda: nn.Embedding(VOCABULARY, N_OUT),
    "parameter": Matrix,
    "experts": Experts,
}
#: What the error of a layer calls it.
WORDS = {"linear": "linear", "conv1d": "linear|conv1d", "conv2d": "conv", "embedding": "embedding"}
WORDS |= {"parameter": "parameter", "experts": "parameter"}
#: The kinds whose factors are modules that have an input, and those of `target_parameters`.
CALLED, RAW = ("linear", "conv1d", "conv2d"), ("parameter", "experts")


def fresh_base(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The base layer that `adapted` starts from: the same numbers at each call."""
    torch.manual_seed(0)
    return BASES[kind]().to(dtype)


class Mode(NamedTuple):
    """The adapters of a model, all of them active; or one for each sample of the batch."""

    names: tuple[str, ...]
    training: bool
    rows: tuple[str, ...] | None = None

    @property
    def last(self) -> str:
        """The adapter that the tests change."""
        return self.names[-1]

    def rows_of(self, name: str) -> Tensor:
        """The indices of the samples that have this adapter, (n,)."""
        return torch.tensor([i for i in range(BATCH) if self.rows is None or self.rows[i] == name])


MODES = {
    "one in training": Mode(("default",), training=True),
    "two in training": Mode(("default", "other"), training=True),
    "one in evaluation": Mode(("default",), training=False),
    "two in evaluation": Mode(("default", "other"), training=False),
    "a mixed batch": Mode(("default", "other"), training=False, rows=("other", "__base__", "default", "other")),
}


def adapted(
    kind: str,
    mode: Mode = MODES["one in training"],
    dtype: torch.dtype = torch.float64,
    p: float = 0.0,
    library: ModuleType = lora_ref,
    **options: Any,
) -> Any:
    """An adapted network of one layer, `proj`. Its numbers are the same at each call; A and B are not zero."""
    model: Any = nn.Sequential(OrderedDict(proj=fresh_base(kind, dtype)))
    targets: dict[str, Any] = {"target_modules": ["proj"], "fan_in_fan_out": kind == "conv1d", "lora_dropout": p}
    if kind in RAW:
        targets = {"target_modules": [], "target_parameters": ["proj.weight"]}
    for name in mode.names:
        made = {"r": RANKS[name], "lora_alpha": ALPHAS[name], "init_lora_weights": False, **targets, **options}
        config = library.LoraConfig(**made)
        if name == mode.names[0]:
            model = library.get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    model.base_model.set_adapter(list(mode.names))
    return model.train(mode.training)


def layer_of(model: Any) -> Any:
    """The adapted layer."""
    return model.get_base_model().proj


def same_in_peft(ours: Any, kind: str, mode: Mode, p: float = 0.0) -> Any:
    """PEFT's model with the numbers of ours, in float64."""
    theirs = adapted(kind, mode, p=p, library=pytest.importorskip("peft"))
    theirs.load_state_dict(ours.state_dict())
    return theirs


def input_of(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """A batch of `BATCH` samples."""
    generator = torch.Generator().manual_seed(1)
    if kind == "embedding":
        return torch.randint(0, VOCABULARY, (BATCH, 3), generator=generator)
    shape = (BATCH, 3, 5, 5) if kind == "conv2d" else (BATCH, 3, N_IN)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def factor(kind: str, layer: Any, side: str, name: str) -> nn.Parameter:
    """The parameter A or B of one adapter."""
    if kind == "embedding":
        return getattr(layer, f"lora_embedding_{side}")[name]
    return getattr(layer, f"lora_{side}")[name].weight


def parameters(kind: str, layer: Any, mode: Mode) -> dict[str, nn.Parameter]:
    """{name: parameter} of all factors."""
    return {f"{side} of {name}": factor(kind, layer, side, name) for name in mode.names for side in "AB"}


def same(x: Tensor) -> Tensor:
    return x


def formula(
    kind: str,
    layer: Any,
    x: Tensor,
    mode: Mode,
    at: Mapping[str, Function] | None = None,
    weights: Mapping[str, Callable[[], Tensor]] | None = None,
    p: float = 0.0,
) -> Tensor:
    """The layer's output in float64, from its parameters.

    Args:
        at: {"lora_A.default out": f}: f is applied to the output of that module; with "in", to its input.
        weights: {"lora_A.default": f}: f() in place of the weight of that module, in the shape of its storage.
        p: the probability of dropout. The masks are those of `nn.Dropout`, in the order of the adapters.
    """
    at, weights, base = at or {}, weights or {}, layer.get_base_layer()

    def run(place: str, v: Tensor, function: Function) -> Tensor:
        return at.get(f"{place} out", same)(function(at.get(f"{place} in", same)(v)))

    def weight(side: str, name: str) -> Tensor:
        place = f"lora_{side}.{name}"
        return (weights[place]() if place in weights else factor(kind, layer, side, name)).double()

    def branch(x: Tensor, name: str) -> Tensor:
        A, B = weight("A", name), weight("B", name)
        v = run(f"lora_dropout.{name}", x, lambda v: F.dropout(v, p, mode.training) if p else v)
        z = run(f"lora_A.{name}", v, lambda v: product_with_A(kind, base, v, A))
        return layer.scaling[name] * run(f"lora_B.{name}", z, lambda z: product_with_B(kind, z, B))

    def update(A: Tensor, B: Tensor) -> Tensor:
        if kind == "parameter":
            return B @ A
        # the rows of A are expert by expert, the columns of B rank by rank
        return B.unflatten(1, (-1, N_EXPERTS)).permute(2, 0, 1) @ A.unflatten(0, (N_EXPERTS, -1))

    def with_branches(x: Tensor) -> Tensor:
        W = (weights["base_layer"]() if "base_layer" in weights else base.weight).double()
        if kind in RAW:
            W = W + sum(layer.scaling[name] * update(weight("A", name), weight("B", name)) for name in mode.names)
            return torch.einsum("...i,eoi->...o", x, W if kind == "experts" else W[None])
        bias = getattr(base, "bias", None)
        y = run("base_layer", x, lambda v: product(kind, base, v, W, None if bias is None else bias.double()))
        for name in mode.names:
            rows = mode.rows_of(name)
            y = y.index_add(0, rows, branch(x[rows], name))
        return y

    return run("layer", x.double() if x.is_floating_point() else x, with_branches)


def product(kind: str, base: Any, v: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """The base layer's output, from its weight as stored."""
    if kind == "embedding":
        return W[v]
    if kind == "conv2d":
        return F.conv2d(v, W, bias, base.stride, base.padding)
    return F.linear(v, W.T if kind == "conv1d" else W, bias)


def product_with_A(kind: str, base: Any, v: Tensor, A: Tensor) -> Tensor:
    """A v: a convolution like the base's, or rows of A^T, or a product."""
    if kind == "embedding":
        return A.T[v]
    return F.conv2d(v, A, None, base.stride, base.padding) if kind == "conv2d" else F.linear(v, A)


def product_with_B(kind: str, z: Tensor, B: Tensor) -> Tensor:
    """B z: a convolution of kernel 1, or a product."""
    return F.conv2d(z, B) if kind == "conv2d" else F.linear(z, B)


def results(
    call: Function, x: Tensor, trained: Mapping[str, nn.Parameter], absolute: bool = False
) -> dict[str, Tensor]:
    """The output, and the gradients of x and of the parameters, from a loss that weighs each output differently.

    The output alone, where nothing has a gradient.
    """
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    for parameter in trained.values():
        parameter.grad = None
    y = call(x)
    if not y.requires_grad:
        return {"y": y}
    weights = torch.linspace(-1, 1, y.numel()).bfloat16().to(y.dtype).view(y.shape)  # exact in each dtype
    (y * (weights.abs() if absolute else weights)).sum().backward()
    found = {name: parameter.grad for name, parameter in trained.items()}
    found |= {"x": x.grad} if x.is_floating_point() else {}
    return {"y": y.detach(), **{name: g.clone() for name, g in found.items() if g is not None}}


def call_of(model: Any, mode: Mode, seed: int = 2) -> Function:
    """The model as a function of x, with the same random numbers at each call."""

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return model(x) if mode.rows is None else model(x, adapter_names=list(mode.rows))

    return call


def seeded(function: Function, seed: int = 2) -> Function:
    """The function, with the random numbers of `call_of`."""

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(seed)
        return function(x)

    return call


def assert_formula(
    kind: str,
    model: Any,
    mode: Mode,
    at: Mapping[str, Function] | None = None,
    weights: Mapping[str, Callable[[], Tensor]] | None = None,
    p: float = 0.0,
    trained: Mapping[str, nn.Parameter] | None = None,
) -> None:
    """The model's output and gradients are those of the formula, in float64. `trained`: by default A and B."""
    layer, x = layer_of(model), input_of(kind)
    trained = parameters(kind, layer, mode) if trained is None else trained
    want = results(seeded(lambda x: formula(kind, layer, x, mode, at, weights, p)), x, trained)
    got = results(call_of(model, mode), x, trained)
    assert got.keys() == want.keys()
    agree(got, want)


def assert_within(
    kind: str,
    model: Any,
    mode: Mode,
    dtype: torch.dtype,
    at: Mapping[str, Function] | None = None,
    at_sizes: Mapping[str, Function] | None = None,
) -> None:
    """As `assert_formula`, for a model of any dtype: the difference is a bounded number of roundings.

    Args:
        dtype: of the input and of the output.
        at_sizes: the functions of `at` for absolute values, where |f(v)| <= |v|.
    """
    layer, x = layer_of(model), input_of(kind, dtype)
    trained = parameters(kind, layer, mode)
    want = results(lambda x: formula(kind, layer, x, mode, at), x, trained)
    got = results(call_of(model, mode), x, trained)
    plain = copy.deepcopy(model).double()
    for parameter in plain.parameters():
        parameter.data.abs_()
    positive = layer_of(plain)
    size = results(
        lambda x: formula(kind, positive, x, mode, at_sizes),
        x.double().abs() if x.is_floating_point() else x,
        parameters(kind, positive, mode),
        absolute=True,
    )
    assert got["y"].dtype == dtype
    assert got.keys() == want.keys() == size.keys()
    # the sums are over tokens, inputs, outputs and ranks, in float32 at least
    fan_in = layer.get_base_layer().weight[0].numel()
    longest = x.shape.numel() // x.shape[1] + fan_in + N_OUT + sum(RANKS[name] for name in mode.names)
    for name, value in got.items():
        coarse = max(value.dtype, dtype, key=unit)
        # each cast, bias, scaling, function and sum is a rounding of its own
        terms = longest * min(1, UNIT["float32"] / unit(coarse)) + 12
        close(value, want[name], terms, size[name], coarse, what=name)


# -- changes from outside --------------------------------------------------------------------------


def flipped(v: Tensor) -> Tensor:
    """-sin(v), which is far from v for all v but 0, and whose slope is at most 1. Of tokens: the last is the first."""
    return -v.sin() if v.is_floating_point() else VOCABULARY - 1 - v


def tripled(v: Tensor) -> Tensor:
    """v itself, with three times its gradient."""
    return 3 * v - (2 * v).detach() if v.is_floating_point() else v


class Event(NamedTuple):
    """A hook, the side of the module on which it acts, and the function by which the value or gradient changes."""

    attach: Callable[[nn.Module], Any]
    side: str
    function: Function


def times_three(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else 3 * g for g in gradients)


EVENTS = {
    "forward hook": Event(lambda m: m.register_forward_hook(lambda m, args, y: flipped(y)), "out", flipped),
    "forward hook with kwargs": Event(
        lambda m: m.register_forward_hook(lambda m, args, kwargs, y: flipped(y), with_kwargs=True), "out", flipped
    ),
    "forward pre-hook": Event(
        lambda m: m.register_forward_pre_hook(lambda m, args: (flipped(args[0]), *args[1:])), "in", flipped
    ),
    "forward pre-hook with kwargs": Event(
        lambda m: m.register_forward_pre_hook(
            lambda m, args, kwargs: ((flipped(args[0]), *args[1:]), kwargs), with_kwargs=True
        ),
        "in",
        flipped,
    ),
    "backward hook": Event(
        lambda m: m.register_full_backward_hook(lambda m, into, out: times_three(into)), "in", tripled
    ),
    "backward pre-hook": Event(
        lambda m: m.register_full_backward_pre_hook(lambda m, out: times_three(out)), "out", tripled
    ),
    "forward hook on all modules": Event(
        lambda m: everywhere.register_module_forward_hook(lambda each, args, y: flipped(y) if each is m else None),
        "out",
        flipped,
    ),
    "forward pre-hook on all modules": Event(
        lambda m: everywhere.register_module_forward_pre_hook(
            lambda each, args: (flipped(args[0]), *args[1:]) if each is m else None
        ),
        "in",
        flipped,
    ),
    "backward hook on all modules": Event(
        lambda m: everywhere.register_module_full_backward_hook(
            lambda each, into, out: times_three(into) if each is m else None
        ),
        "in",
        tripled,
    ),
}


def module_at(layer: Any, place: str) -> nn.Module:
    """The module at "layer", "base_layer" or "lora_A.default"."""
    return layer if place == "layer" else layer.get_submodule(place)


@contextmanager
def attached(event: Event, *modules: nn.Module) -> Iterator[None]:
    """A `with` block in which each of the modules has the hook."""
    handles = [event.attach(module) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def right_or_refused(
    act: Callable[[], Any], right: Callable[[Any], None], unchanged: Callable[[], None], words: str = "proj"
) -> bool:
    """`right(act())` holds; or `act` raises our ValueError, and `unchanged()` holds.

    `words`: a regular expression of what the error must name. A method of the model knows the layer's name, a layer
    that is called knows its kind.
    """
    try:
        done = act()
    except ValueError as error:
        assert re.search(f"(?i){words}", str(error)), str(error)
        unchanged()
        return False
    right(done)
    return True


def merging_changes_no_output_or_is_refused(kind: str, build: Callable[[], Any]) -> None:
    """The output is that of a model that was not merged, in float64; or our ValueError names the layer.

    The model that is merged has not been called before: nothing has computed its weights since they changed.
    """
    x, plain = input_of(kind), build()
    want = plain(x).detach()
    with plain.disable_adapter():
        base = plain(x).detach()
    assert distance(want, base) > 0.01
    agree(plain.unload()(x), base)

    def merged(model: Any) -> None:
        agree(model(x), want)
        with model.disable_adapter():
            agree(model(x), base)
        agree(model(x), want)
        model.unmerge_adapter()
        agree(model(x), want)

    one, other = build(), build()
    right_or_refused(one.merge_adapter, lambda _: merged(one), lambda: agree(one(x), want))
    right_or_refused(other.merge_and_unload, lambda done: agree(done(x), want), lambda: agree(other(x), want))


def saved_as_computed_or_refused(kind: str, build: Callable[[], Any], folder: Path) -> None:
    """A folder from which the same output is loaded, in float64; or our ValueError, and no file of the last adapter."""
    x, model = input_of(kind), build()
    want = build()(x).detach()
    names = list(model.peft_config)

    def right(_: Any) -> None:
        net = nn.Sequential(OrderedDict(proj=fresh_base(kind)))
        again = lora_ref.PeftModel.from_pretrained(net, folder, names[0])
        for name in names[1:]:
            again.load_adapter(folder / name, name)
        again.base_model.set_adapter(names)
        agree(again.eval()(x), want)

    def nothing() -> None:
        assert not list((folder / names[-1]).rglob("*.safetensors"))

    right_or_refused(lambda: model.save_pretrained(folder), right, nothing)
