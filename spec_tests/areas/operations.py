"""An adapted model as a whole: its output, merging, switching off, unloading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import Array, Implementation, LayerState, Model, ModelSpec
from ..generate import ALPHAS, claimed, integers, model_inputs, models, reals
from ..registry import requirement

MERGED = "LoRA, arXiv 2106.09685, section 4.1: a merged model is a plain one (U1)"
OFF = 'PEFT\'s documentation of disable_adapter: "Use this to run inference on the base model" (U2)'
UNLOAD = "PEFT's documentation of unload and merge_and_unload (U5, U6)"
TARGETS = ["proj", "up", "head"]

States = Mapping[str, Sequence[LayerState]]


@st.composite
def small(draw: Any, implementation: Implementation, **config: Any) -> ModelSpec:
    """A model of five or six modules; its layers are of all kinds that are claimed."""
    kind = st.sampled_from(claimed(implementation, ("linear", "transposed")))
    shapes: dict[str, tuple[str, int, int]] = {}
    if "embedding" in implementation.claims and draw(st.booleans()):
        shapes["emb"] = ("embedding", 4, 6)
    shapes |= {
        "a.proj": (draw(kind), 4, 4),
        "a.up": (draw(kind), 6, 4),
        "norm": ("norm", 6, 6),
        "a.down": (draw(kind), 4, 6),
        "head": (draw(kind), 3, 4),
    }
    targets = [*TARGETS, *(["emb"] if "emb" in shapes else [])]
    options: dict[str, Any] = {"target_modules": targets, "r": st.sampled_from((1, 2, 3))} | config
    return draw(models(implementation, shapes, **options))


def fill(model: Model, spec: ModelSpec, adapter: str = "default", salt: int = 0, exact: bool = False) -> dict[str, Any]:
    """Random factors for every adapted module; {module: state}."""
    rng = np.random.default_rng([spec.seed, salt, 5])
    numbers = integers if exact else reals
    for name in model.adapted(adapter):
        state = model.read(name, adapter)
        model.write(name, numbers(rng, state.A.shape), numbers(rng, state.B.shape) / 2, adapter)
    return {name: model.read(name, adapter) for name in model.adapted(adapter)}


def output(
    spec: ModelSpec,
    states: Sequence[Mapping[str, LayerState]],
    x: Array,
    least: Mapping[str, Array] | None = None,
) -> tuple[Array, Array]:
    """The output of the chain with the sum of these adapters, and its bound.

    least: what the bounds of the weights are at least.
    """
    y, size = x, abs(x)
    for name, module in spec.modules.items():
        W, bound = weight(spec, name, states)
        if least is not None:
            bound = np.maximum(bound, least[name])
        b = 0.0 if module.b is None else module.b
        if module.kind == "norm":
            y, size = W * y + b, bound * size + abs(b)
        elif module.kind == "embedding":
            y, size = W.T[y], bound.T[size]
        else:
            y, size = y @ W.T + b, size @ bound.T + abs(b)
    return y, size


def weight(spec: ModelSpec, name: str, states: Sequence[Mapping[str, LayerState]]) -> tuple[Array, Array]:
    """W + the sum of s B A of a module, and its bound."""
    W, bound = spec.modules[name].W, abs(spec.modules[name].W)
    for state in states:
        if name in state:
            A, B, s = state[name].A, state[name].B, state[name].scaling
            W, bound = W + oracle.delta(A, B, s), bound + oracle.delta_bound(A, B, s)
    return W, bound


def gives(check: Check, model: Model, spec: ModelSpec, states: Sequence[Mapping[str, LayerState]], what: str) -> None:
    """The model's output is that of the sum of these adapters; each module may add 8 roundings."""
    x = model_inputs(spec)
    y, size = output(spec, states, x)
    check.close(model.forward(x), y, size, spec.dtype, what, factor=8.0 * len(spec.modules))


def holds(
    check: Check,
    weights: Mapping[str, tuple[Array, Array | None]],
    spec: ModelSpec,
    states: Sequence[Mapping[str, LayerState]],
    what: str,
    exact: bool = False,
    factor: float = 8.0,
) -> None:
    """These are the base weights plus the sum of these adapters, and the base biases."""
    check.equal(sorted(weights), sorted(spec.modules), f"the modules of {what}")
    for name, module in spec.modules.items():
        W, b = weights[name]
        want, size = weight(spec, name, states)
        if exact:
            check.equal(W, want, f"{what}: {name}.weight")
        else:
            check.close(W, want, size, spec.dtype, f"{what}: {name}.weight", factor)
        if module.b is not None:
            check.equal(b, module.b, f"{what}: {name}.bias")


@requirement(
    "MODEL-001",
    "The output is that of the base modules with W + s B A where they are adapted.",
    "D1",
    "model write",
    small,
)
def model_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    gives(check, model, spec, [states], "the output")


@requirement(
    "MODEL-002",
    "Adapting, setting and running leave every base weight bit for bit as it was.",
    MERGED,
    "model write",
    small,
)
def model_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    model.forward(model_inputs(spec))
    holds(check, model.base(), spec, [], "the base model", exact=True)


@requirement("MODEL-003", "A and B of the adapted modules train, and nothing else.", "B1", "model trainable", small)
def model_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    want = sorted(f"{name}.{letter}:default" for name in model.adapted() for letter in "AB")
    check.equal(sorted(model.trainable()), want, "what trains")


@requirement(
    "MODEL-004",
    "Merging puts W + s B A into every adapted module, and keeps the output.",
    MERGED,
    "model merge write",
    small,
)
def model_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    holds(check, model.base(), spec, [states], "the merged model")
    gives(check, model, spec, [states], "the merged output")


@requirement(
    "MODEL-005", "Merging twice is merging once.", "U1: idempotent for each adapter", "model merge unmerge write", small
)
def model_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    model.merge()
    holds(check, model.base(), spec, [states], "the model merged twice")
    model.unmerge()
    for name, (W, _) in model.base().items():
        _, size = weight(spec, name, [states])
        check.close(W, spec.modules[name].W, size, spec.dtype, f"{name}.weight, unmerged once", factor=16)


@requirement(
    "MODEL-006", "Unmerging takes the update out of every module again.", MERGED, "model merge unmerge write", small
)
def model_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    model.unmerge()
    for name, (W, _) in model.base().items():
        _, size = weight(spec, name, [states])
        check.close(W, spec.modules[name].W, size, spec.dtype, f"the unmerged {name}.weight", factor=16)
    gives(check, model, spec, [states], "the output after unmerging")


@requirement(
    "MODEL-007",
    "Switched off, the model is the base model; on again, the adapted one.",
    OFF,
    "model disable trainable write",
    small,
)
def model_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    trained = model.trainable()
    model.enable(False)
    gives(check, model, spec, [], "the output, off")
    model.enable(True)
    gives(check, model, spec, [states], "the output, on again")
    check.equal(sorted(model.trainable()), sorted(trained), "what trains, on again")


@requirement(
    "MODEL-008", "A merged model that is switched off is the base model.", OFF, "model disable merge write", small
)
def model_008(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    model.enable(False)
    x = model_inputs(spec)
    want, size = output(spec, [], x)[0], output(spec, [states], x)[1]
    check.close(model.forward(x), want, size, spec.dtype, "the output, merged and off", 16.0 * len(spec.modules))
    model.enable(True)
    want, size = output(spec, [states], x)
    check.close(model.forward(x), want, size, spec.dtype, "the output, on again", 16.0 * len(spec.modules))


@requirement(
    "MODEL-009", "Unloading with merging gives plain modules with W + s B A.", UNLOAD, "model unload write", small
)
def model_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    holds(check, model.unload(merge=True), spec, [states], "the merged and unloaded model")


@requirement(
    "MODEL-010",
    "Unloading without merging gives the base model back, bit for bit.",
    UNLOAD,
    "model unload write",
    small,
)
def model_010(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    holds(check, model.unload(merge=False), spec, [], "the unloaded model", exact=True)


@requirement(
    "MODEL-011",
    "Unloading a merged model without merging gives the base model back, too.",
    'PEFT\'s documentation of unload: "Gets back the base model by removing all the lora modules without merging" (U6)',
    "model unload merge write",
    small,
)
def model_011(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    for name, (W, _) in model.unload(merge=False).items():
        _, size = weight(spec, name, [states])
        check.close(W, spec.modules[name].W, size, spec.dtype, f"the unloaded {name}.weight", factor=16)


@requirement(
    "MODEL-012",
    "Merging and unloading a model that is merged already adds nothing again.",
    UNLOAD,
    "model unload merge write",
    small,
)
def model_012(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    holds(check, model.unload(merge=True), spec, [states], "the merged and unloaded model")


@requirement(
    "MODEL-013",
    "A safe merge with NaN in one module's factors is refused, and no module is merged.",
    "lora_ref's decision (U4): PEFT's documentation of safe_merge is about one layer's weights",
    "model merge safe_merge all_or_nothing write",
    small,
)
def model_013(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    last = list(states)[-1]
    A = states[last].A.copy()
    A.flat[0] = np.nan
    model.write(last, A, states[last].B)
    check.refused(lambda: model.merge(safe=True), f"merging NaN into {last}")
    holds(check, model.base(), spec, [], "the model after the refusal", exact=True)


@requirement(
    "MODEL-014",
    "With integers and a scaling that is a power of two the merged model is exact.",
    MERGED,
    "model merge write",
    lambda i: small(i, r=2, lora_alpha=st.sampled_from((1.0, 2.0, 4.0) if "alpha" in i.claims else (2.0, 4.0))),
)
def model_014(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    for module in spec.modules.values():
        module.W[...] = np.round(module.W * 4)
    model = implementation.model(spec)
    states = fill(model, spec, exact=True)
    model.merge()
    holds(check, model.base(), spec, [states], "the merged model", exact=True)


@requirement("MODEL-015", "Two models made alike do not share their adapters.", "D1", "model write", small)
def model_015(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    one, two = implementation.model(spec), implementation.model(spec)
    states = fill(two, spec, salt=1)
    fill(one, spec, salt=2)
    gives(check, two, spec, [states], "the output after another model was changed")


@requirement(
    "MODEL-016",
    "A batch gives what its samples give alone.",
    "D1",
    "model write",
    lambda i: small(i, lora_alpha=st.sampled_from(ALPHAS)),
)
def model_016(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    x = model_inputs(spec, batch=4)
    _, size = output(spec, [states], x)
    parts = np.concatenate([model.forward(x[i : i + 1]) for i in range(4)])
    check.close(model.forward(x), parts, size, spec.dtype, "the output", 16.0 * len(spec.modules))
