"""Models in half precision: several adapters act, are merged, merged in part, and saved."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import folder as folders
from ..check import Check
from ..contract import Array, Implementation, LayerState, Model, ModelSpec
from ..generate import claimed, model_inputs, models
from ..registry import requirement
from ..rounding import UNIT
from .files import tensors_of
from .operations import output, weight

SUM = "PEFT, BaseTuner.set_adapter: several adapters can be active (D1)"
MERGED = "LoRA, arXiv 2106.09685, section 4.1: the merged weight is W + B A"
ONCE = "lora_ref's decision: W and all updates are summed in float32 and rounded once (T3)"
FLOAT32 = 'PEFT, get_peft_model: autocast_adapter_dtype casts "adapter weights using float16 and bfloat16" (T1)'
DTYPE = "torch.nn.Linear: the output has the dtype of weight and input; an adapted layer takes its place (T2)"
SAVED = "PEFT, save_pretrained: the adapter's weights are written as they are (X2)"
OTHER = "other"
LARGEST = 6e4  # float16 ends at 65504

States = Sequence[Mapping[str, LayerState]]


@st.composite
def halves(draw: Any, implementation: Implementation) -> ModelSpec:
    """A small model in float16 or bfloat16, of which two modules are adapted."""
    kind = st.sampled_from(claimed(implementation, ("linear", "transposed")))
    dtype = draw(st.sampled_from(claimed(implementation, ("float16", "bfloat16"))))
    shapes = {"a.proj": (draw(kind), 5, 4), "norm": ("norm", 5, 5), "head": (draw(kind), 3, 5)}
    options: dict[str, Any] = {"r": st.sampled_from((1, 2)), "lora_alpha": st.sampled_from((1.0, 2.0))}
    spec = draw(models(implementation, shapes, target_modules=["proj", "head"], **options))
    return dataclasses.replace(spec, dtype=dtype)


def fine(model: Model, spec: ModelSpec, adapter: str = "default", salt: int = 0) -> dict[str, LayerState]:
    """Factors for every adapted module, with as many digits as float32 has; {module: state}."""
    rng = np.random.default_rng([spec.seed, salt, 7])
    for name in model.adapted(adapter):
        state = model.read(name, adapter)
        A, B = (rng.standard_normal(factor.shape).astype(np.float32) / 2 for factor in (state.A, state.B))
        model.write(name, A.astype(np.float64), B.astype(np.float64), adapter)
    return {name: model.read(name, adapter) for name in model.adapted(adapter)}


def two(implementation: Implementation, spec: ModelSpec) -> tuple[Model, States]:
    """The model with two filled adapters, of which "default" is active."""
    model = implementation.model(spec)
    first = fine(model, spec)
    model.add(OTHER, {**spec.config, "r": 3})
    return model, [first, fine(model, spec, OTHER, salt=1)]


def within(spec: ModelSpec, states: States) -> bool:
    """Does the largest number that can occur fit into float16?"""
    return bool(output(spec, states, model_inputs(spec))[1].max() < LARGEST)


def gives(check: Check, model: Model, spec: ModelSpec, states: States, what: str) -> None:
    """The output is the oracle's; each module may add 8 roundings."""
    y, size = output(spec, states, model_inputs(spec))
    if size.max() < LARGEST:
        check.close(model.forward(model_inputs(spec)), y, size, spec.dtype, what, factor=8.0 * len(spec.modules))


def once(check: Check, weights: Mapping[str, tuple[Array, Any]], spec: ModelSpec, states: States, what: str) -> None:
    """Every weight is W plus the sum of the updates, rounded once to the dtype after float32."""
    for name in spec.modules:
        want, size = weight(spec, name, states)
        bound = abs(want) + 16 * size * UNIT["float32"] / UNIT[spec.dtype]
        check.close(weights[name][0], want, bound, spec.dtype, f"{what}: {name}.weight", factor=1.0)


def stored(spec: ModelSpec, y: Array) -> Array:
    """y, rounded to the dtype of the model."""
    if spec.dtype == "float16":
        return y.astype(np.float16).astype(np.float64)
    bits = folders.encoded(y, "BF16")  # cuts off what bfloat16 cannot hold
    return folders.decoded(bits, "BF16", list(y.shape))


@requirement(
    "HALF-001",
    "The updates of several active adapters add up in half precision, too.",
    SUM,
    "model write adapters summed",
    halves,
)
def half_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, states = two(implementation, spec)
    model.set(["default", OTHER])
    gives(check, model, spec, states, "the output with two active adapters")


@requirement(
    "HALF-002",
    "Each adapter that is merged into a half precision weight adds one rounding of itself, and one of the sum.",
    f"{MERGED}; PEFT's documentation of merge_adapter merges the active adapters (T3)",
    "model write merge adapters summed",
    halves,
)
def half_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, states = two(implementation, spec)
    model.set(["default", OTHER])
    model.merge()
    for name, (W, _) in model.base().items():
        want, size = weight(spec, name, states)
        check.close(W, want, size, spec.dtype, f"the merged {name}.weight", factor=2.0 * len(states))


@requirement(
    "HALF-003",
    "A half precision weight into which several adapters are merged is rounded once.",
    ONCE,
    "model write merge adapters summed decision:rounded_once",
    halves,
)
def half_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, states = two(implementation, spec)
    model.set(["default", OTHER])
    model.merge()
    once(check, model.base(), spec, states, "the merged model")


@requirement(
    "HALF-004",
    "Merging one adapter after the other rounds once for each merge.",
    ONCE,
    "model write merge adapters summed partial_merge decision:rounded_once",
    halves,
)
def half_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, states = two(implementation, spec)
    model.set(["default", OTHER])
    model.merge(["default"])
    model.merge([OTHER])
    for name, (W, _) in model.base().items():
        between, (want, size) = weight(spec, name, states[:1])[0], weight(spec, name, states)
        bound = abs(between) + abs(want) + 16 * size * UNIT["float32"] / UNIT[spec.dtype]
        check.close(W, want, bound, spec.dtype, f"the merged {name}.weight", factor=1.0 + UNIT[spec.dtype])


@requirement(
    "HALF-005",
    "The plain model into which several adapters are merged has weights that are rounded once.",
    ONCE,
    "model write merge unload adapters summed decision:rounded_once",
    halves,
)
def half_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, states = two(implementation, spec)
    model.set(["default", OTHER])
    once(check, model.unload(merge=True), spec, states, "the plain model")


@requirement(
    "HALF-006",
    "With one of two active adapters merged, the other still acts in half precision.",
    f"{SUM}; {MERGED}",
    "model write merge adapters summed partial_merge",
    halves,
)
def half_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, states = two(implementation, spec)
    model.set(["default", OTHER])
    model.merge([OTHER])
    gives(check, model, spec, states, "the output with one of two adapters merged")


@requirement(
    "HALF-007",
    "Unmerging several adapters gives the half precision weights back bit for bit.",
    "lora_ref's decision: unmerging restores the weight bit for bit (T3)",
    "model write merge unmerge adapters summed exact_unmerge",
    halves,
)
def half_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, _ = two(implementation, spec)
    model.set(["default", OTHER])
    model.merge()
    model.unmerge()
    for name, (W, _) in model.base().items():
        check.equal(W, spec.modules[name].W, f"{name}.weight after unmerging")


@requirement(
    "HALF-008",
    "The output of a half precision model with several adapters is in the dtype of the model.",
    DTYPE,
    "model write adapters summed",
    halves,
)
def half_008(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, states = two(implementation, spec)
    if within(spec, states):
        model.set(["default", OTHER])
        y = model.forward(model_inputs(spec))
        check.equal(y, stored(spec, y), "the output, rounded to the dtype of the model")


@requirement(
    "HALF-009",
    "The factors of every adapter of a half precision model hold numbers of float32.",
    FLOAT32,
    "model write adapters float32_factors",
    halves,
)
def half_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model, _ = two(implementation, spec)
    A = np.full(model.read("head", OTHER).A.shape, 1 + 2.0**-20)
    B = np.full(model.read("head", OTHER).B.shape, 1 - 2.0**-20)
    model.write("head", A, B, OTHER)
    state = model.read("head", OTHER)
    check.equal(state.A, A, "A of the second adapter")
    check.equal(state.B, B, "B of the second adapter")


@requirement(
    "HALF-010",
    "The folder of a half precision model holds the float32 factors, number by number.",
    f"{FLOAT32}; {SAVED}",
    "model write files float32_factors",
    halves,
    slow=2,
)
def half_010(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fine(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        _, tensors = folders.read(Path(place))
    for key, value in tensors_of(spec, states).items():
        check.equal(tensors.get(folders.PREFIX + key), value, key)


@requirement(
    "HALF-011",
    "Float32 factors of a folder are loaded into a half precision model without a rounding.",
    f"{FLOAT32}; PEFT, from_pretrained has the same option (X3)",
    "model write files float32_factors",
    halves,
    slow=2,
)
def half_011(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fine(model, spec)
    with tempfile.TemporaryDirectory() as place:
        folders.write(Path(place), spec.config, tensors_of(spec, states))
        again = implementation.load(spec, Path(place))
    for name, state in states.items():
        loaded = again.read(name)
        check.equal(loaded.A, state.A, f"A of {name}")
        check.equal(loaded.B, state.B, f"B of {name}")


@requirement(
    "HALF-012",
    "Switched off, a half precision model gives the output of its base number by number.",
    "PEFT's documentation of disable_adapter: it is for inference on the base model (U2)",
    "model write adapters summed disable",
    halves,
)
def half_012(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    x = model_inputs(spec)
    model, _ = two(implementation, spec)
    model.set(["default", OTHER])
    model.enable(False)
    gives(check, model, spec, [], "the output of the model that is switched off")
    y = model.forward(x)
    model.enable(True)
    for adapter in ("default", OTHER):
        for name in model.adapted(adapter):
            state = model.read(name, adapter)
            model.write(name, 0 * state.A, state.B, adapter)
    check.equal(model.forward(x), y, "the output with updates of 0")
