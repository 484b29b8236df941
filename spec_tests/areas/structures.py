"""Models that are more than chains of linear layers: convolutions, modules used or held twice, tied weights."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import MESH, Array, Implementation, LayerSpec, LayerState, Model, ModelSpec, ModuleSpec
from ..generate import ALPHAS, CONVOLUTIONS, claimed, model_inputs, reals, seeds
from ..registry import requirement
from .operations import fill, holds, weight

ACTS = "LoRA, arXiv 2106.09685, section 4.1, eq. (3): h = W x + B A x, wherever a layer is called (D1)"
SAME = "LoRA, arXiv 2106.09685, section 4.1: merged, a model gives what it gave, and W can be recovered (U1, U3)"
TIED = "PEFT, LoraConfig.ensure_weight_tying: without it, the adapters of tied layers are apart (N13, U1)"
NAMED = "PEFT, LoraConfig.target_modules: the names of the modules to apply the adapter to (N1)"
FILES = "PEFT, PeftModel.save_pretrained and from_pretrained: the adapter can be loaded again (X1, X2)"
OFF = 'PEFT, disable_adapter: "Use this to run inference on the base model" (U2)'

States = Sequence[Mapping[str, LayerState]]


def normed(y: Array, size: Array) -> tuple[Array, Array]:
    """N(y), and how large the numbers are whose roundings it has: those of y, times N's derivatives, and its own."""
    root = np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    z = (y - y.mean(-1, keepdims=True)) / root
    moved = size + size.mean(-1, keepdims=True) + abs(z) * (abs(z) * size).mean(-1, keepdims=True)
    return z, moved / root + abs(z)


def step(spec: ModelSpec, name: str, states: States, y: Array, size: Array) -> tuple[Array, Array]:
    """The output of one module, and its bound."""
    module = spec.modules[spec.same.get(name, name)]
    W, bound = weight(spec, spec.same.get(name, name), states)
    if module.kind == "embedding":
        return W.T[y], bound.T[size]
    if MESH.get(module.kind):
        layer, b = LayerSpec(module.kind, W), None if module.b is None else abs(module.b)
        return oracle.apply(layer, W, module.b, y), oracle.apply(layer, bound, b, size)
    b = np.zeros(len(W)) if module.b is None else module.b
    return y @ W.T + b, size @ bound.T + abs(b)


def expected(spec: ModelSpec, states: States, x: Array) -> tuple[Array, Array]:
    """The output of the modules in the order of their calls, and its bound."""
    y, size = x, abs(x)
    for name in spec.order or spec.modules:
        if name not in spec.encoders:
            y, size = step(spec, name, states, y, size)
            continue
        y, size = normed(2 * y, 2 * size)
        inner, large = step(spec, f"{name}.linear1", states, y, size)
        more, larger = step(spec, f"{name}.linear2", states, np.maximum(inner, 0), large)
        y, size = normed(y + more, size + larger)
    return y, size


def gives(check: Check, model: Model, spec: ModelSpec, states: States, what: str, train: bool = False) -> None:
    """The output is that of the sum of these adapters; each call may add 8 roundings, and an encoder has five."""
    x = model_inputs(spec)
    y, size = expected(spec, states, x)
    calls = len(spec.order or spec.modules) + 4 * len(spec.encoders)
    check.close(model.forward(x, train=train), y, size, spec.dtype, what, 8.0 * calls)


def loaded(implementation: Implementation, spec: ModelSpec, model: Model) -> Model:
    """The base model with the adapter that is saved and loaded."""
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        return implementation.load(spec, Path(place))


@st.composite
def convolutions(draw: Any, implementation: Implementation) -> ModelSpec:
    """Two convolutions, with kernels of two and of one."""
    kind = draw(st.sampled_from(claimed(implementation, CONVOLUTIONS)))
    rng, d = np.random.default_rng(draw(seeds)), MESH[kind]
    modules = {
        "stem": ModuleSpec(kind, reals(rng, (3, 2, *[2] * d)), reals(rng, (3,))),
        "block.0.conv": ModuleSpec(kind, reals(rng, (2, 3, *[1] * d))),
    }
    return ModelSpec(modules, options(draw, draw(st.sampled_from((["stem"], ["stem", "conv"])))), seed=draw(seeds))


def options(draw: Any, targets: Any) -> dict[str, Any]:
    return {"r": draw(st.sampled_from((1, 2))), "lora_alpha": draw(st.sampled_from(ALPHAS)), "target_modules": targets}


@st.composite
def squares(draw: Any, order: Sequence[str], same: Mapping[str, str] | None = None) -> ModelSpec:
    """Two square layers, called in this order; "a.shared" is adapted."""
    rng = np.random.default_rng(draw(seeds))
    modules = {n: ModuleSpec("linear", reals(rng, (3, 3)), reals(rng, (3,))) for n in ("a.shared", "a.other")}
    targets = draw(st.sampled_from((["shared"], ["shared", "other"])))
    return ModelSpec(modules, options(draw, targets), seed=draw(seeds), order=order, same=same or {})


def twice(implementation: Implementation) -> Any:
    return squares(("a.shared", "a.other", "a.shared"))


def held(implementation: Implementation) -> Any:
    return squares(("a.shared", "a.other", "b.again"), {"b.again": "a.shared"})


@st.composite
def tied(draw: Any, implementation: Implementation) -> ModelSpec:
    """An embedding, and a head whose weight is the embedding's table."""
    rng = np.random.default_rng(draw(seeds))
    W = reals(rng, (4, 6))
    modules = {
        "emb": ModuleSpec("embedding", W),
        "body": ModuleSpec("linear", reals(rng, (4, 4)), reals(rng, (4,))),
        "head": ModuleSpec("linear", W.T),
    }
    targets = draw(st.sampled_from((["head"], ["emb"], ["body", "head"], ["emb", "head"])))
    return ModelSpec(modules, options(draw, targets), seed=draw(seeds), tied={"head": "emb"})


@requirement(
    "STRUCT-001",
    "Each convolution that is named gets an adapter, and it acts.",
    f"{ACTS}; {NAMED} (D4)",
    "model model:convolutions write",
    convolutions,
)
def struct_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    want = ["block.0.conv", "stem"] if "conv" in spec.config["target_modules"] else ["stem"]
    check.equal(sorted(states), want, "the adapted modules")
    gives(check, model, spec, [states], "the output")


@requirement(
    "STRUCT-002",
    "Merging convolutions keeps a model's output, and unmerging restores their weights.",
    f"{SAME} (D4)",
    "model model:convolutions merge unmerge write",
    convolutions,
)
def struct_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    holds(check, model.base(), spec, [states], "the merged model")
    model.unmerge()
    for name, (W, _) in model.base().items():
        check.close(W, spec.modules[name].W, weight(spec, name, [states])[1], spec.dtype, f"{name}, unmerged", 16.0)


@requirement(
    "STRUCT-003",
    "An adapter of convolutions is saved and loaded again.",
    f"{FILES} (D4)",
    "model model:convolutions files write",
    convolutions,
    slow=3,
)
def struct_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    gives(check, loaded(implementation, spec, model), spec, [states], "the output of the loaded adapter")


@requirement(
    "STRUCT-004",
    "The adapter of a module that is called twice acts in both calls.",
    ACTS,
    "model linear model:used_twice write",
    twice,
)
def struct_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    gives(check, model, spec, [fill(model, spec)], "the output")


@requirement(
    "STRUCT-005",
    "Merging a module that is called twice adds its update once.",
    SAME,
    "model linear model:used_twice merge write",
    twice,
)
def struct_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    holds(check, model.base(), spec, [states], "the merged model")


@requirement(
    "STRUCT-006",
    "A module with two names is refused, or its adapter acts under both, merged and not.",
    f"torch.nn.Module.named_modules: a module that is there twice is one module; {SAME}",
    "model linear model:held_twice merge write",
    held,
)
def struct_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = check.tried(lambda: implementation.model(spec))
    if model is None:
        return
    states = fill(model, spec)
    gives(check, model, spec, [states], "the output")
    model.merge()
    gives(check, model, spec, [states], "the merged output")


@requirement(
    "STRUCT-007",
    "Switched off, a module with two names acts as the base module under both.",
    OFF,
    "model linear model:held_twice disable write",
    held,
)
def struct_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = check.tried(lambda: implementation.model(spec))
    if model is None:
        return
    fill(model, spec)
    model.enable(False)
    gives(check, model, spec, [], "the output, off")


@requirement(
    "STRUCT-008",
    "An adapter of one of two tied modules acts in that module alone, or is refused.",
    f"{TIED}; {ACTS}",
    "model linear embedding model:tied write",
    tied,
)
def struct_008(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = check.tried(lambda: implementation.model(spec))
    if model is not None:
        gives(check, model, spec, [fill(model, spec)], "the output")


@requirement(
    "STRUCT-009",
    "Merging an adapter of a tied module leaves the other module's weight alone, or is refused.",
    f"{SAME}; {TIED}",
    "model linear embedding model:tied merge write",
    tied,
)
def struct_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = check.tried(lambda: implementation.model(spec))
    if model is None:
        return
    states = fill(model, spec)
    acts = states if check.tried(lambda: model.merge() or True) else {}
    holds(check, model.base(), spec, [acts], "the model after merging")


@requirement(
    "STRUCT-010",
    "The plain model of a merged tied module has the update in that module alone, or is refused.",
    f"{SAME}; {TIED}",
    "model linear embedding model:tied merge unload write",
    tied,
)
def struct_010(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = check.tried(lambda: implementation.model(spec))
    if model is None:
        return
    states = fill(model, spec)
    weights = check.tried(lambda: model.unload(merge=True))
    if weights is not None:
        holds(check, weights, spec, [states], "the plain model")


@requirement(
    "STRUCT-011",
    "Several active adapters of a module that is called twice act in both calls.",
    f"{ACTS}; PEFT, LoraModel.set_adapter: several adapters are active at a time (U7)",
    "model linear model:used_twice adapters summed write",
    twice,
)
def struct_011(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    first = fill(model, spec)
    model.add("other", spec.config)
    second = fill(model, spec, "other", salt=1)
    model.set(["default", "other"])
    gives(check, model, spec, [first, second], "the output of both")
