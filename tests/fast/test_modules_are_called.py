"""lora_A, lora_B, lora_dropout and the base layer are called, so that what is attached to them acts.

The expected numbers are those of `written_out.formula`, which calls no module of the layer. They are PEFT's, too, where
PEFT calls the same modules.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as everywhere
from torch.nn.utils import parametrizations, prune
from written_out import (
    BATCH,
    CALLED,
    EVENTS,
    MODES,
    RAW,
    WORDS,
    Function,
    Mode,
    adapted,
    assert_formula,
    assert_within,
    attached,
    call_of,
    input_of,
    layer_of,
    merging_changes_no_output_or_is_refused,
    module_at,
    parameters,
    right_or_refused,
    same_in_peft,
    saved_as_computed_or_refused,
    tripled,
)

import lora_ref
from lora_ref import get_peft_model_state_dict, set_peft_model_state_dict
from spec_tests import agree, distance

peft = pytest.importorskip("peft")

# -- hooks -----------------------------------------------------------------------------------------

#: The modes without "one in evaluation".
FOUR = ("one in training", "two in training", "two in evaluation", "a mixed batch")
PLACES = ("lora_dropout", "lora_A", "lora_B", "base_layer", "layer")


def place_of(part: str, name: str) -> str:
    return part if part in ("base_layer", "layer") else f"{part}.{name}"


@functools.cache
def both_libraries(kind: str, mode: str, p: float) -> list[Any]:
    """The same model of lora_ref and of PEFT. No test changes them for longer than a `with` block."""
    ours = adapted(kind, MODES[mode], p=p)
    return [ours, same_in_peft(ours, kind, MODES[mode], p)]


def hooked() -> list[tuple[str, str, str, str]]:
    """(kind, part, event, mode): all of them for a linear layer, and the plain hooks for the others."""
    cases = [("linear", part, event, mode) for part in PLACES for event in EVENTS for mode in FOUR]
    plain = [event for event in EVENTS if "all modules" not in event and "kwargs" not in event]
    for kind in CALLED[1:]:
        cases += [
            (kind, part, event, mode)
            for part in PLACES[:-1]
            for event in plain
            for mode in ("two in training", "a mixed batch")
        ]
    return cases + [("embedding", part, "forward hook", mode) for part in PLACES[-2:] for mode in FOUR]


@pytest.mark.parametrize("kind, part, event, mode", hooked())
def test_a_hook_acts(kind: str, part: str, event: str, mode: str) -> None:
    chosen, hook = MODES[mode], EVENTS[event]
    place = place_of(part, chosen.last)
    # an unhooked layer may draw its own masks; an embedding has no dropout
    p = 0.0 if part == "layer" or kind == "embedding" else 0.25
    ours, theirs = both_libraries(kind, mode, p)
    libraries = [ours, theirs]
    if chosen.rows and "backward" in event and (part == "base_layer" or "all modules" in event):
        libraries = [ours]  # PEFT adds to the output in place, which autograd refuses here
    for model in libraries:
        with attached(hook, module_at(layer_of(model), place)):
            assert_formula(kind, model, chosen, {f"{place} {hook.side}": hook.function}, p=p)


@pytest.mark.parametrize("event", ["forward hook", "forward pre-hook", "backward pre-hook"])
@pytest.mark.parametrize("part", ["base_layer", "layer"])
@pytest.mark.parametrize("kind", CALLED)
def test_a_hook_acts_in_a_merged_model(kind: str, part: str, event: str) -> None:
    mode, hook = MODES["two in training"], EVENTS[event]
    model = adapted(kind, mode)
    layer = layer_of(model)
    model.merge_adapter()
    trained = {"weight": layer.get_base_layer().weight.requires_grad_()}
    with attached(hook, module_at(layer, part)):
        at = {f"{part} {hook.side}": hook.function}
        assert_formula(kind, model, Mode((), training=True), at, trained=trained)


@pytest.mark.parametrize("event", ["forward hook", "forward pre-hook", "backward pre-hook"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_a_hook_acts_in_every_precision(kind: str, dtype: torch.dtype, part: str, event: str) -> None:
    """The factors of a half-precision base are float32, and the input of lora_A is, too."""
    mode, hook = MODES["two in training"], EVENTS[event]
    place = place_of(part, mode.last)
    model = adapted(kind, mode, dtype)
    key = f"{place} {hook.side}"
    with attached(hook, module_at(layer_of(model), place)):
        absolute = {key: hook.function if hook.function is tripled else lambda v: v}
        assert_within(kind, model, mode, dtype, {key: hook.function}, absolute)


@pytest.mark.parametrize("event", ["forward hook", "backward pre-hook", "forward pre-hook on all modules"])
@pytest.mark.parametrize("part", PLACES[1:])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_hooks_come_and_go(kind: str, part: str, event: str) -> None:
    """The same model before its first hook, with it, and after it is removed."""
    mode, hook = MODES["two in training"], EVENTS[event]
    place = place_of(part, mode.last)
    model = adapted(kind, mode)
    for _ in range(2):
        assert_formula(kind, model, mode)
        with attached(hook, module_at(layer_of(model), place)):
            assert_formula(kind, model, mode, {f"{place} {hook.side}": hook.function})
            with torch.no_grad():
                without_gradients = model(input_of(kind))
            agree(without_gradients, model(input_of(kind)))
    assert_formula(kind, model, mode)


EVERYWHERE: dict[str, Any] = {
    "forward": everywhere.register_module_forward_hook,
    "forward pre": everywhere.register_module_forward_pre_hook,
    "backward": everywhere.register_module_full_backward_hook,
    "backward pre": everywhere.register_module_full_backward_pre_hook,
}


@pytest.mark.parametrize("event", EVERYWHERE)
@pytest.mark.parametrize("kind", CALLED)
def test_hooks_on_all_modules_see_each_of_them(kind: str, event: str) -> None:
    mode, seen = MODES["two in training"], []
    model = adapted(kind, mode, p=0.25)
    layer = layer_of(model)
    handle = EVERYWHERE[event](lambda module, *values: seen.append(module))
    try:
        model(input_of(kind).requires_grad_()).sum().backward()
    finally:
        handle.remove()
    parts = [place_of(part, name) for name in mode.names for part in PLACES]
    assert {id(module_at(layer, part)) for part in parts} <= {id(module) for module in seen}


def recorded(inputs: list[Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    inputs.append(args[0].detach())


@pytest.mark.parametrize("kind", CALLED)
def test_modules_are_called_once_where_their_adapter_acts_with_the_samples_that_have_it(kind: str) -> None:
    mode = MODES["a mixed batch"]
    model, merged, x = adapted(kind, mode, p=0.25), adapted(kind, mode, p=0.25), input_of(kind)
    merged.merge_adapter()
    inputs: dict[str, list[Tensor]] = {}
    parts = [place_of(part, name) for name in mode.names for part in PLACES[:3]]
    for part in parts:
        inputs[part] = seen = []
        for each in (model, merged):
            record = functools.partial(recorded, seen)
            module_at(layer_of(each), part).register_forward_pre_hook(record)

    def shapes() -> dict[str, list[int]]:
        found = {part: [len(v) for v in seen] for part, seen in inputs.items()}
        for seen in inputs.values():
            seen.clear()
        return found

    none: dict[str, list[int]] = {part: [] for part in parts}
    model(x)
    assert shapes() == {part: [BATCH] for part in parts}
    model(x, adapter_names=list(mode.rows))
    for name in mode.names:
        for part in PLACES[:2]:
            assert torch.equal(inputs[f"{part}.{name}"][0], x[mode.rows_of(name)])
    assert shapes() == {part: [len(mode.rows_of(part.split(".")[1]))] for part in parts}
    with model.disable_adapter():
        model(x)
    merged(x)
    assert shapes() == none
    model.set_adapter("other")
    model(x)
    assert shapes() == {part: [BATCH] if part.endswith("other") else [] for part in parts}


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("mode", ["one in training", "two in evaluation"])
@pytest.mark.parametrize("kind", RAW)
def test_a_hook_on_the_factors_of_a_raw_parameter_acts_or_is_refused(kind: str, mode: str, part: str) -> None:
    """Twice the output of A, or of B, is twice the update. (PEFT ignores such a hook.)"""
    chosen = MODES[mode]
    model = adapted(kind, chosen)
    layer, x = layer_of(model), input_of(kind)
    assert_formula(kind, model, chosen)
    place = f"{part}.{chosen.last}"
    module_at(layer, place).register_forward_hook(lambda module, args, y: 2 * y)
    weights = {place: lambda: 2 * module_at(layer, place).weight}
    right_or_refused(
        lambda: model(x),
        lambda y: assert_formula(kind, model, chosen, weights=weights),
        lambda: None,
        WORDS[kind],
    )


# -- other modules in their places -----------------------------------------------------------------


class Wrapper(nn.Module):
    """A module without a weight of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


def subclass(old: nn.Module) -> nn.Module:
    """The same parameters in a class with another forward."""
    new = copy.copy(old)
    new.__class__ = type("Own", (type(old),), {"forward": lambda self, x: type(old).forward(self, x).tanh()})
    return new


def patched(old: nn.Module) -> nn.Module:
    """The same object with a forward of its own."""
    plain = old.forward
    old.forward = types.MethodType(lambda self, x: plain(x).tanh(), old)  # type: ignore[method-assign]
    return old


class Doubling(Tensor):
    """A weight of a class of its own: twice the product."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * y.as_subclass(Tensor) if func in (F.linear, F.conv2d) else y


def doubling(old: Any) -> nn.Module:
    """A plain layer around such a weight."""
    old.weight = nn.Parameter(old.weight.detach().as_subclass(Doubling))
    return old


def with_bias(old: Any) -> nn.Module:
    """A plain layer that adds a constant."""
    old.register_parameter("bias", nn.Parameter(torch.linspace(1, 2, old.weight.shape[0]).double()))
    return old


REPLACED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a subclass": subclass,
    "a patched forward": patched,
    "a sequence": lambda old: nn.Sequential(old, nn.Tanh()),
    "a wrapper": Wrapper,
    "a bias": with_bias,
    "a weight of another class": doubling,
}


def replaced(
    kind: str, mode: Mode, part: str, what: str, library: ModuleType = lora_ref
) -> tuple[Any, dict[str, Function], dict[str, Any], dict[str, Any]]:
    """A model with another module in the place of a factor; `at` and `weights` of the formula; what trains."""
    model = adapted(kind, mode, library=library)
    layer, place = layer_of(model), f"{part}.{mode.last}"
    trained: dict[str, Any] = parameters(kind, layer, mode)
    weight = module_at(layer, place).weight
    new = getattr(layer, part)[mode.last] = REPLACED[what](module_at(layer, place))
    function: Function = torch.tanh
    if what == "a bias":
        trained["bias"] = new.bias
        function = lambda v: v + new.bias.view(-1, *(1,) * (v.ndim - 2) if kind == "conv2d" else ())  # noqa: E731
    elif what == "a weight of another class":
        trained[f"{part[-1]} of {mode.last}"] = weight = new.weight
        function = lambda v: 2 * v  # noqa: E731
    return model, {f"{place} out": function}, {place: lambda: weight.as_subclass(Tensor)}, trained


@pytest.mark.parametrize("mode", ["one in training", "two in evaluation", "a mixed batch"])
@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", CALLED)
def test_a_factor_that_is_another_module(kind: str, part: str, what: str, mode: str) -> None:
    has_weight = what not in ("a sequence", "a wrapper")  # PEFT reads the dtype off it
    for library in (lora_ref, peft) if kind == "linear" and has_weight else (lora_ref,):
        model, at, weights, trained = replaced(kind, MODES[mode], part, what, library)
        assert_formula(kind, model, MODES[mode], at, weights, trained=trained)


@pytest.mark.parametrize("what", REPLACED)
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_merging_a_factor_that_is_another_module_is_refused(kind: str, part: str, what: str) -> None:
    """No weight has the same output, or (a bias) the sum of two parameters has."""
    mode = MODES["two in evaluation"]
    merging_changes_no_output_or_is_refused(kind, lambda: replaced(kind, mode, part, what)[0])


@pytest.mark.parametrize("what", ["a sequence", "a wrapper"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_a_module_without_a_weight_is_not_saved_as_a_factor(part: str, what: str, tmp_path: Path) -> None:
    model = replaced("linear", MODES["one in training"], part, what)[0]
    with pytest.raises(ValueError, match="proj"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()


class Halved(nn.Module):
    """Half of the input, in training and in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class HalvedDropout(nn.Dropout):
    """A subclass of nn.Dropout, of another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def patched_dropout(dropout: nn.Module) -> nn.Module:
    dropout.forward = lambda x: x / 2  # type: ignore[method-assign]
    return dropout


#: A module in the place of nn.Dropout(0.25), and its output as a function of the input and of `training`.
DROPOUTS: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[Tensor, bool], Tensor]]] = {
    "a module": (lambda old: Halved(), lambda x, training: x / 2),
    "a subclass": (lambda old: HalvedDropout(old.p), lambda x, training: x / 2),
    "a patched forward": (patched_dropout, lambda x, training: x / 2),
    "alpha dropout": (lambda old: nn.AlphaDropout(0.25), lambda x, training: F.alpha_dropout(x, 0.25, training)),
    "nothing": (lambda old: nn.Identity(), lambda x, training: x),
}


@pytest.mark.parametrize("mode", ["one in training", "two in evaluation", "a mixed batch"])
@pytest.mark.parametrize("what", DROPOUTS)
@pytest.mark.parametrize("kind", CALLED)
def test_a_dropout_that_is_another_module(kind: str, what: str, mode: str) -> None:
    chosen, (new, function) = MODES[mode], DROPOUTS[what]
    for library in (lora_ref, peft) if kind == "linear" else (lora_ref,):
        model = adapted(kind, chosen, p=0.25, library=library)
        layer = layer_of(model)
        layer.lora_dropout[chosen.last] = new(layer.lora_dropout[chosen.last]).train(chosen.training)
        at = {f"lora_dropout.{chosen.last} out": lambda v: function(v, chosen.training)}
        assert_formula(kind, model, chosen, at)


@pytest.mark.parametrize("mode", ["one in training", "two in evaluation", "a mixed batch"])
@pytest.mark.parametrize("kind", CALLED)
def test_a_dropout_that_is_put_where_there_was_none(kind: str, mode: str) -> None:
    chosen = MODES[mode]
    model = adapted(kind, chosen)
    layer_of(model).lora_dropout[chosen.last] = Halved()
    assert_formula(kind, model, chosen, {f"lora_dropout.{chosen.last} out": lambda v: v / 2})


@pytest.mark.parametrize("kind", CALLED)
def test_a_dropout_that_is_deleted(kind: str) -> None:
    mode = MODES["two in training"]
    model = adapted(kind, mode, p=0.25)
    for name in mode.names:
        del layer_of(model).lora_dropout[name]
    assert_formula(kind, model, mode)


@pytest.mark.parametrize("mode", ["two in evaluation", "a mixed batch"])
@pytest.mark.parametrize("kind", CALLED)
def test_dropout_that_trains_in_a_model_in_evaluation(kind: str, mode: str) -> None:
    """As for Monte Carlo dropout: p = 1 drops all, so that the adapter adds nothing."""
    chosen = MODES[mode]
    model = adapted(kind, chosen, p=1.0)
    layer_of(model).lora_dropout[chosen.last].train()
    assert_formula(kind, model, chosen, {f"lora_dropout.{chosen.last} out": lambda v: 0 * v})


# -- weights that are computed from others ---------------------------------------------------------


def norms(v: Tensor) -> Tensor:
    """The length of each row of v, in the shape (out, 1, ...)."""
    return v.flatten(1).norm(dim=1).view(-1, *(1,) * (v.ndim - 1))


def pruned(module: Any) -> tuple[Callable[[], Tensor], dict[str, nn.Parameter]]:
    prune.l1_unstructured(module, "weight", 0.5)
    mask = module.weight_mask.clone()
    assert (mask == 0).any() and (mask == 1).any()
    return lambda: module.weight_orig * mask, {"orig": module.weight_orig}


def normed_by_a_hook(module: Any) -> tuple[Callable[[], Tensor], dict[str, nn.Parameter]]:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module)
    g, v = module.weight_g, module.weight_v
    return lambda: g * v / norms(v), {"g": g, "v": v}


def normed(module: Any) -> tuple[Callable[[], Tensor], dict[str, nn.Parameter]]:
    parametrizations.weight_norm(module)
    g, v = module.parametrizations.weight.original0, module.parametrizations.weight.original1
    return lambda: g * v / norms(v), {"g": g, "v": v}


def divided(original: nn.Parameter, left: Tensor, right: Tensor, training: bool) -> Tensor:
    """W / (u^T W v), after a step of the power iteration in training; left and right (u and v) are written to."""
    W = original.flatten(1)
    if training:
        with torch.no_grad():
            left.copy_(F.normalize(W @ right, dim=0))
            right.copy_(F.normalize(W.T @ left, dim=0))
    return original / (left.clone() @ W @ right.clone())


def divided_by_a_hook(module: Any) -> tuple[Callable[[], Tensor], dict[str, nn.Parameter]]:
    nn.utils.spectral_norm(module)
    left, right, original = module.weight_u.clone(), module.weight_v.clone(), module.weight_orig

    def weight() -> Tensor:
        W = original.flatten(1)
        if module.training:  # this one has the other order
            with torch.no_grad():
                right.copy_(F.normalize(W.T @ left, dim=0))
                left.copy_(F.normalize(W @ right, dim=0))
        return original / (left.clone() @ W @ right.clone())

    return weight, {"orig": original}


def divided_by_its_norm(module: Any) -> tuple[Callable[[], Tensor], dict[str, nn.Parameter]]:
    parametrizations.spectral_norm(module)
    computed = module.parametrizations.weight
    left, right, original = computed[0]._u.clone(), computed[0]._v.clone(), computed.original
    return lambda: divided(original, left, right, module.training), {"orig": original}


COMPUTED = {
    "pruned": pruned,
    "weight_norm by a hook": normed_by_a_hook,
    "weight_norm": normed,
    "spectral_norm by a hook": divided_by_a_hook,
    "spectral_norm": divided_by_its_norm,
}


def computed(
    kind: str, mode: Mode, part: str, what: str, library: ModuleType = lora_ref
) -> tuple[Any, dict[str, Any], dict[str, nn.Parameter]]:
    """A model one of whose weights is computed; `weights` of the formula; the parameters that train."""
    model = adapted(kind, mode, library=library)
    layer, place = layer_of(model), place_of(part, mode.last)
    trained = parameters(kind, layer, mode)
    trained.pop(f"{part[-1]} of {mode.last}", None)
    weight, originals = COMPUTED[what](module_at(layer, place))
    if part == "base_layer":
        originals = {name: original.requires_grad_() for name, original in originals.items()}
    return model, {place: weight}, trained | originals


def step(trained: Mapping[str, nn.Parameter]) -> None:
    """A step of gradient descent, from the gradients of the last backward pass."""
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("mode", ["one in training", "a mixed batch"])
@pytest.mark.parametrize("what", COMPUTED)
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer"])
@pytest.mark.parametrize("kind", CALLED)
def test_a_computed_weight_trains(kind: str, part: str, what: str, mode: str) -> None:
    """Each call computes it again, once: the parameters behind it have the gradients, and are what is stepped."""
    twice = what == "spectral_norm" and MODES[mode].training  # PEFT reads the weight twice, for its dtype
    for library in (lora_ref, peft) if kind == "linear" and not twice else (lora_ref,):
        model, weights, trained = computed(kind, MODES[mode], part, what, library)
        for _ in range(2):
            assert_formula(kind, model, MODES[mode], weights=weights, trained=trained)
            step(trained)
        assert_formula(kind, model, MODES[mode], weights=weights, trained=trained)


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", [*CALLED, *RAW])
def test_a_pruned_factor_that_is_made_plain_again(kind: str, part: str) -> None:
    mode = MODES["one in training"]
    model, weights, trained = computed(kind, mode, part, "pruned")
    layer, place = layer_of(model), place_of(part, mode.last)
    assert_formula(kind, model, mode, weights=weights, trained=trained)
    step(trained)
    want = weights[place]().detach()
    prune.remove(module_at(layer, place), "weight")
    agree(module_at(layer, place).weight, want)
    assert_formula(kind, model, mode)


@pytest.mark.parametrize("what", COMPUTED)
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("kind", RAW)
def test_a_computed_factor_of_a_raw_parameter_trains(kind: str, part: str, what: str) -> None:
    mode = MODES["one in training"]
    model, weights, trained = computed(kind, mode, part, what)
    for _ in range(3):
        assert_formula(kind, model, mode, weights=weights, trained=trained)
        step(trained)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_pruned_factor_of_an_embedding_trains(side: str) -> None:
    mode = MODES["one in training"]
    model = adapted("embedding", mode)
    layer = layer_of(model)
    trained = parameters("embedding", layer, mode)
    holder = getattr(layer, f"lora_embedding_{side}")
    prune.l1_unstructured(holder, "default", 0.5)
    trained[f"{side} of default"] = original = holder.default_orig
    mask = holder.default_mask.clone()
    assert (mask == 0).any()
    for _ in range(3):
        weights = {f"lora_{side}.default": lambda: original * mask}
        assert_formula("embedding", model, mode, weights=weights, trained=trained)
        step(trained)


def trained_a_step(kind: str, part: str, what: str) -> Any:
    """A model in evaluation whose computed weight has not been computed since its parameters changed."""
    mode = MODES["two in evaluation"]
    model, _, trained = computed(kind, mode, part, what)
    call_of(model, mode)(input_of(kind)).square().sum().backward()
    step(trained)
    return model


@pytest.mark.parametrize("what", COMPUTED)
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "base_layer"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_merging_computed_weights(kind: str, part: str, what: str) -> None:
    merging_changes_no_output_or_is_refused(kind, lambda: trained_a_step(kind, part, what))


@pytest.mark.parametrize("what", COMPUTED)
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_saving_computed_factors(part: str, what: str, tmp_path: Path) -> None:
    saved_as_computed_or_refused("linear", lambda: trained_a_step("linear", part, what), tmp_path)


@pytest.mark.parametrize("what", [what for what in COMPUTED if what != "pruned"])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_setting_computed_factors(part: str, what: str) -> None:
    mode, x = MODES["one in evaluation"], input_of("linear")
    other = adapted("linear", mode, init_lora_weights="gaussian")
    layer = layer_of(other)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    want = other(x).detach()
    model = computed("linear", mode, part, what)[0]
    before = model(x).detach()
    assert distance(want, before) > 0.1
    right_or_refused(
        lambda: set_peft_model_state_dict(model, get_peft_model_state_dict(other)),
        lambda _: agree(model(x), want),
        lambda: agree(model(x), before),
    )


# -- two devices -----------------------------------------------------------------------------------


def holders(kind: str, layer: Any, name: str, sides: str) -> list[nn.Module]:
    """The modules that hold A, B or both of one adapter."""
    if kind == "embedding":
        return [getattr(layer, f"lora_embedding_{side}") for side in sides]
    return [getattr(layer, f"lora_{side}")[name] for side in sides]


def moved(kind: str, mode: Mode, what: str) -> tuple[Any, Tensor]:
    """A model and an input, parts of which are on the device "meta"."""
    model, x = adapted(kind, mode), input_of(kind)
    layer = layer_of(model)
    if what == "the input":
        x = x.to("meta")
    elif what == "the model":
        model.to("meta")
    elif what == "the base":
        layer.get_base_layer().to("meta")
    elif what == "the factors":
        for name in mode.names:
            for module in holders(kind, layer, name, "AB"):
                module.to("meta")
    else:
        for module in holders(kind, layer, mode.last, what):
            module.to("meta")
    return model, x


MOVED = ("the factors", "A", "B", "the base", "the input", "the model")


def mixtures() -> list[tuple[str, str, str]]:
    """(kind, what, mode). The module of a raw parameter has inputs of any kind, and no adapter for each sample."""
    modes = ("one in training", "two in evaluation", "a mixed batch")
    cases = [(kind, what, mode) for kind in (*CALLED, "embedding") for what in MOVED for mode in modes]
    return cases + [(kind, what, mode) for kind in RAW for what in MOVED[:4] for mode in modes[:2]]


@pytest.mark.parametrize("kind, what, mode", mixtures())
def test_two_devices_are_an_error(kind: str, what: str, mode: str) -> None:
    chosen = MODES[mode]
    model, x = moved(kind, chosen, what)
    with pytest.raises(ValueError, match=f"(?i)({WORDS[kind]})") as raised:
        call_of(model, chosen)(x)
    assert "meta" in str(raised.value) and "cpu" in str(raised.value)


@pytest.mark.parametrize("kind", [*CALLED, "embedding", *RAW])
def test_one_device_that_holds_no_numbers_has_shapes(kind: str) -> None:
    for mode in (MODES["one in training"], MODES["two in evaluation"]):
        model, x = adapted(kind, mode), input_of(kind)
        want = model(x)
        got = model.to("meta")(x.to("meta"))
        assert (got.device.type, got.shape, got.dtype) == ("meta", want.shape, want.dtype)


@pytest.mark.parametrize("kind", [*CALLED, *RAW])
def test_an_adapter_that_does_not_act_may_be_on_another_device(kind: str) -> None:
    mode = MODES["two in evaluation"]
    model, x = moved(kind, mode, "AB")
    layer = layer_of(model)
    with model.disable_adapter():
        agree(model(x), layer.get_base_layer()(x))
    model.set_adapter("default")
    alone = Mode(("default",), training=False)
    assert_formula(kind, model, alone)
    if kind not in RAW:
        assert_formula(kind, model, Mode(("default",), training=False, rows=("default", "__base__") * 2))
    model.merge_adapter()
    agree(model(x), adapted(kind, alone)(x))


@pytest.mark.parametrize("what", ["the factors", "A", "B", "the base"])
@pytest.mark.parametrize("kind", [*CALLED, "embedding", *RAW])
def test_two_devices_are_not_merged(kind: str, what: str) -> None:
    for how in ("merge_adapter", "merge_and_unload"):
        model, _ = moved(kind, MODES["two in evaluation"], what)
        weight = layer_of(model).get_base_layer().weight
        before = weight if weight.is_meta else weight.detach().clone()
        with pytest.raises(ValueError, match="proj") as raised:
            getattr(model, how)()
        assert "meta" in str(raised.value) and "cpu" in str(raised.value)
        now = layer_of(model).get_base_layer().weight
        assert now is weight and (weight.is_meta or torch.equal(now, before))
