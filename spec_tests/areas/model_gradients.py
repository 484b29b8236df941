"""The gradients of a whole model: of every parameter that trains, through all modules after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Array, Implementation, LayerState, Model, ModelSpec
from ..generate import model_inputs, reals
from ..registry import requirement
from .adapters_named import both, pairs
from .operations import fill, small, weight

CHAIN = "Rumelhart, Hinton and Williams, Nature 323, 1986: gradients go back through the layers by the chain rule"
TRAINS = "LoRA, arXiv 2106.09685, section 4.1: W is frozen, A and B contain the trainable parameters (B1)"
SUM = "PEFT, BaseTuner.set_adapter: several adapters can be active (D1)"
SET = "PEFT, set_adapter: the adapter that is set becomes trainable, the others do not (U7)"
MERGED = "LoRA, arXiv 2106.09685, section 4.1: a merged model computes with W + B A alone (U1)"
OFF = "PEFT's documentation of disable_adapter: the adapters take no part (U2)"
SAVED = "PEFT, LoraConfig: modules_to_save are modules that are trained as well (N10)"
BIAS = "PEFT, LoraConfig: with bias 'all' or 'lora_only' the corresponding biases are updated (B5)"

States = Sequence[Mapping[str, LayerState]]


def slopes(spec: ModelSpec) -> Array:
    """dL/dy."""
    rng = np.random.default_rng([spec.seed, 13])
    return reals(rng, (len(model_inputs(spec)), len(list(spec.modules.values())[-1].W)))


def backward(spec: ModelSpec, named: Mapping[str, Mapping[str, LayerState]], merged: States = ()) -> dict[str, Any]:
    """{parameter: (gradient, its bound)} with these adapters acting, and others in the weights."""
    seen, y = [], (model_inputs(spec), abs(model_inputs(spec)))
    for name, module in spec.modules.items():
        seen.append(y)
        b = 0.0 if module.b is None else module.b
        Ws = weight(spec, name, [*merged, *named.values()])
        if module.kind == "embedding":
            y = Ws[0].T[y[0]], Ws[1].T[y[1]]
        elif module.kind == "norm":
            y = Ws[0] * y[0] + b, Ws[1] * y[1] + abs(b)
        else:
            y = y[0] @ Ws[0].T + b, y[1] @ Ws[1].T + abs(b)
    found: dict[str, Any] = {}
    dy = slopes(spec), abs(slopes(spec))
    for (name, module), x in reversed(list(zip(spec.modules.items(), seen, strict=True))):
        Ws = weight(spec, name, [*merged, *named.values()])
        if module.kind == "embedding":
            dW = np.zeros_like(module.W), np.zeros_like(module.W)
            for gradient, slope in zip(dW, dy, strict=True):
                np.add.at(gradient.T, x[0], slope)
        elif module.kind == "norm":
            dW = (dy[0] * x[0]).sum(0), (dy[1] * x[1]).sum(0)
        else:
            dW = dy[0].T @ x[0], dy[1].T @ x[1]
        found[f"{name}.weight"], found[f"{name}.bias"] = dW, (dy[0].sum(0), dy[1].sum(0))
        for adapter, states in named.items():
            if name in states:
                A, B, s = states[name].A, states[name].B, states[name].scaling
                found[f"{name}.A:{adapter}"] = s * B.T @ dW[0], abs(s * B).T @ dW[1]
                found[f"{name}.B:{adapter}"] = s * dW[0] @ A.T, dW[1] @ abs(s * A).T
        if module.kind != "embedding":
            dy = (dy[0] * Ws[0], dy[1] * Ws[1]) if module.kind == "norm" else (dy[0] @ Ws[0], dy[1] @ Ws[1])
    return found


def gradients(model: Model, spec: ModelSpec) -> dict[str, Array]:
    return model.grad(model_inputs(spec), slopes(spec))


def agree(check: Check, got: Mapping[str, Array], spec: ModelSpec, want: Mapping[str, Any], *parts: str) -> None:
    """All of these gradients are as computed; `parts`: a gradient's name contains one of them."""
    for key, (gradient, bound) in want.items():
        if any(part in key for part in parts):
            factor = 16.0 * len(spec.modules)
            check.close(got.get(key), gradient, bound, spec.dtype, f"the gradient of {key}", factor)


@requirement(
    "MODELGRAD-001",
    "The gradients of A and B in every module are those of the chain rule.",
    f"{CHAIN}; {TRAINS}",
    "model write model_grad",
    small,
)
def modelgrad_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    agree(check, gradients(model, spec), spec, backward(spec, {"default": states}), ".A:", ".B:")


@requirement(
    "MODELGRAD-002",
    "Of several active adapters each gets its own gradients, with the updates of all.",
    f"{CHAIN}; {SUM}",
    "model write adapters summed model_grad",
    pairs,
)
def modelgrad_002(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    want = backward(spec, {"default": first, name: second})
    agree(check, gradients(model, spec), spec, want, ".A:", ".B:")


@requirement(
    "MODELGRAD-003",
    "What trains has a gradient, and nothing else has one.",
    TRAINS,
    "model write trainable model_grad",
    small,
)
def modelgrad_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    check.equal(sorted(gradients(model, spec)), sorted(model.trainable()), "what has a gradient")


@requirement(
    "MODELGRAD-004",
    "Of two adapters the one that is set has gradients, before and after a switch.",
    SET,
    "model write adapters trainable model_grad",
    pairs,
)
def modelgrad_004(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _, second = both(implementation, case)
    gradients(model, spec)
    model.set([name])
    got = gradients(model, spec)
    check.equal(sorted(got), sorted(model.trainable()), "what has a gradient after a switch")
    agree(check, got, spec, backward(spec, {name: second}), ".A:", ".B:")


@requirement(
    "MODELGRAD-005",
    "Switched off, no factor has a gradient; switched on again, each has its own.",
    OFF,
    "model write disable model_grad",
    small,
)
def modelgrad_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.enable(False)
    check.equal(sorted(gradients(model, spec)), [], "what has a gradient while the adapter is off")
    model.enable(True)
    agree(check, gradients(model, spec), spec, backward(spec, {"default": states}), ".A:", ".B:")


@requirement(
    "MODELGRAD-006",
    "No factor of a merged model has a gradient.",
    MERGED,
    "model write merge model_grad",
    small,
)
def modelgrad_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    model.merge()
    check.equal(sorted(gradients(model, spec)), [], "what has a gradient while the adapter is merged")


@requirement(
    "MODELGRAD-007",
    "After unmerging the gradients are those of before.",
    MERGED,
    "model write merge unmerge model_grad",
    small,
)
def modelgrad_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    gradients(model, spec)
    model.unmerge()
    agree(check, gradients(model, spec), spec, backward(spec, {"default": states}), ".A:", ".B:")


@requirement(
    "MODELGRAD-008",
    "With one of two active adapters merged, the other has gradients through the merged weights.",
    f"{CHAIN}; {MERGED}",
    "model write merge adapters summed partial_merge model_grad",
    pairs,
)
def modelgrad_008(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge(["default"])
    got = gradients(model, spec)
    want = backward(spec, {name: second}, merged=[first])
    check.equal(sorted(got), sorted(key for key in want if ":" in key), "what has a gradient")
    agree(check, got, spec, want, ".A:", ".B:")


@requirement(
    "MODELGRAD-009",
    "The copy of a module in modules_to_save has gradients, and its original has none.",
    f"{CHAIN}; {SAVED}",
    "model write modules_to_save trainable model_grad",
    lambda i: small(i, target_modules=["proj", "up"], modules_to_save=st.sampled_from((["head"], ["norm", "head"]))),
)
def modelgrad_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    got = gradients(model, spec)
    check.equal(sorted(got), sorted(model.trainable()), "what has a gradient")
    copies = {key.removesuffix(":default"): value for key, value in got.items() if "A:" not in key and "B:" not in key}
    want = backward(spec, {"default": states})
    saved = [name for name in spec.modules if name in spec.config["modules_to_save"]]
    agree(check, copies, spec, want, *(f"{name}.{part}" for name in saved for part in ("weight", "bias")))


@requirement(
    "MODELGRAD-010",
    "The biases that train have gradients of the chain rule.",
    f"{CHAIN}; {BIAS}",
    "model write bias trainable model_grad",
    lambda i: small(i, bias=st.sampled_from(("all", "lora_only"))),
)
def modelgrad_010(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    got = gradients(model, spec)
    check.equal(sorted(got), sorted(model.trainable()), "what has a gradient")
    want = backward(spec, {"default": states})
    agree(check, got, spec, {key: want[key] for key in want if key in got}, ".bias")
