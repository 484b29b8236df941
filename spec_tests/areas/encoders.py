"""An encoder layer of torch in training and in evaluation, where torch reads weights without calling the modules."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Array, Implementation, LayerState, Model, ModelSpec, ModuleSpec
from ..generate import ALPHAS, model_inputs, reals, seeds
from ..registry import requirement
from .operations import fill, weight

FAST = "torch.nn.TransformerEncoderLayer: a fast path in evaluation, which computes the same function as forward"
PAPER = "LoRA, arXiv 2106.09685, section 4.1: h = W x + B A x; merged, W + B A takes the place of W"
OFF = "PEFT, PeftModel.disable_adapter (U2)"


@st.composite
def encoders(draw: Any, implementation: Implementation) -> ModelSpec:
    """A linear layer, an encoder layer whose two linear layers are adapted, and a head, in float64."""
    rng = np.random.default_rng(draw(seeds))
    modules = {
        "proj": ModuleSpec("linear", reals(rng, (4, 3)), reals(rng, (4,))),
        "enc.linear1": ModuleSpec("linear", reals(rng, (6, 4)), reals(rng, (6,))),
        "enc.linear2": ModuleSpec("linear", reals(rng, (4, 6)), reals(rng, (4,))),
        "head": ModuleSpec("linear", reals(rng, (2, 4)), reals(rng, (2,))),
    }
    targets = draw(st.sampled_from((["linear1"], ["linear2"], ["linear1", "linear2"])))
    config = {"r": draw(st.integers(1, 2)), "lora_alpha": draw(st.sampled_from(ALPHAS)), "target_modules": targets}
    return ModelSpec(modules, config, dtype="float64", seed=draw(seeds), encoders=("enc",))


def norm(x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def output(spec: ModelSpec, states: dict[str, LayerState]) -> Array:
    """The output with this adapter."""

    def linear(name: str, x: Array) -> Array:
        return x @ weight(spec, name, [states])[0].T + spec.modules[name].b

    h = norm(linear("proj", model_inputs(spec)))
    return linear("head", norm(h + linear("enc.linear2", np.maximum(linear("enc.linear1", h), 0))))


def gives(check: Check, got: Array, spec: ModelSpec, states: dict[str, LayerState], what: str) -> None:
    """Equal up to 2^20 roundings: a network in float64, whose sums nobody writes down, gives away 20 of 53 bits."""
    want = output(spec, states)
    check.close(got, want, max(1.0, float(abs(want).max())), "float64", what, factor=2.0**20)


def both_ways(check: Check, model: Model, spec: ModelSpec, states: dict[str, LayerState], what: str) -> None:
    x = model_inputs(spec)
    gives(check, model.forward(x), spec, states, f"{what}, in evaluation")
    gives(check, model.forward(x, train=True), spec, states, f"{what}, in training")


@requirement(
    "ENCODER-001",
    "In evaluation an adapted encoder layer gives what its layers give with W + s B A.",
    f"{FAST}; {PAPER} (D6)",
    "model linear float64 write encoder",
    encoders,
)
def encoder_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    gives(check, model.forward(model_inputs(spec)), spec, states, "the output in evaluation")


@requirement(
    "ENCODER-002",
    "In training an adapted encoder layer gives the same.",
    f"{FAST}; {PAPER} (D6)",
    "model linear float64 write encoder",
    encoders,
)
def encoder_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    gives(check, model.forward(model_inputs(spec), train=True), spec, states, "the output in training")


@requirement(
    "ENCODER-003",
    "A merged encoder layer gives the same, in training and in evaluation, and after unmerging too.",
    f"{FAST}; {PAPER} (D6)",
    "model linear float64 write merge unmerge encoder",
    encoders,
)
def encoder_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    both_ways(check, model, spec, states, "the merged output")
    model.unmerge()
    both_ways(check, model, spec, states, "the output after unmerging")


@requirement(
    "ENCODER-004",
    "Switched off, an encoder layer is the base layer, in training and in evaluation.",
    f"{FAST}; {OFF} (D6)",
    "model linear float64 write disable encoder",
    encoders,
)
def encoder_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    model.enable(False)
    both_ways(check, model, spec, {}, "the output, off")


@requirement(
    "ENCODER-005",
    "An adapter that is set in evaluation acts in an encoder layer.",
    f"{FAST}; PEFT, PeftModel.set_adapter (U7)",
    "model linear float64 write adapters encoder",
    encoders,
)
def encoder_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    model.add("second", {**spec.config, "target_modules": ["linear1", "linear2"]})
    second = fill(model, spec, "second", salt=1)
    model.set(["second"])
    gives(check, model.forward(model_inputs(spec)), spec, second, "the output of the second adapter")


@requirement(
    "ENCODER-006",
    "An encoder layer comes back plain from unloading, with W + s B A.",
    f"{PAPER}; PEFT, merge_and_unload (U5)",
    "model linear float64 write merge unload encoder",
    encoders,
)
def encoder_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    plain = model.unload(merge=True)
    modules = {name: dataclasses.replace(m, W=plain[name][0]) for name, m in spec.modules.items()}
    gives(check, output(dataclasses.replace(spec, modules=modules), {}), spec, states, "the output of its weights")
