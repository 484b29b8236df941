"""modules_to_save: copies that are trained in full."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, Model, ModelSpec
from ..generate import model_inputs, reals
from ..registry import requirement
from .operations import fill, output, small

DOC = "PEFT's documentation of modules_to_save (Z2)"


def saving(implementation: Implementation, **config: Any) -> Any:
    return small(implementation, **{"target_modules": ["proj", "up"], "modules_to_save": ["head"]} | config)


def train(model: Model, spec: ModelSpec, module: str = "head", salt: int = 0) -> ModelSpec:
    """Change the active copy; the spec of a model that has it in place of the original."""
    rng = np.random.default_rng([spec.seed, salt, 21])
    b = spec.modules[module].b
    W, b = reals(rng, spec.modules[module].W.shape), None if b is None else reals(rng, b.shape)
    model.write_base(module, W, b)
    changed = {**spec.modules, module: type(spec.modules[module])(spec.modules[module].kind, W, b)}
    return ModelSpec(changed, spec.config, spec.dtype, spec.seed)


def gives(check: Check, model: Model, spec: ModelSpec, states: list[Any], what: str) -> None:
    x = model_inputs(spec)
    y, size = output(spec, states, x)
    check.close(model.forward(x), y, size, spec.dtype, what, 8.0 * len(spec.modules))


def untouched(check: Check, model: Model, spec: ModelSpec, what: str) -> None:
    W, b = model.base()["head"]
    check.equal(W, spec.modules["head"].W, f"the original weight {what}")
    check.equal(b, spec.modules["head"].b, f"the original bias {what}")


@requirement("SAVED-001", "The copy starts as the original.", DOC, "model modules_to_save write", saving)
def saved_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    gives(check, model, spec, [fill(model, spec)], "the output")


@requirement(
    "SAVED-002", "The copy trains in full, and the original is frozen.", DOC, "model modules_to_save trainable", saving
)
def saved_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    trains = implementation.model(spec).trainable()
    check.that({"head.weight:default", "head.bias:default"} <= trains, f"the copy does not train: {sorted(trains)}")
    check.that(not {"head.weight", "head.bias"} & trains, "the original trains")


@requirement(
    "SAVED-003",
    "Training changes the output through the copy, and not the original.",
    DOC,
    "model modules_to_save write",
    saving,
)
def saved_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    trained = train(model, spec)
    gives(check, model, trained, [states], "the output with the trained copy")
    untouched(check, model, spec, "after training")


@requirement(
    "SAVED-004",
    "Switched off, the model uses the original; on again, the copy.",
    DOC,
    "model modules_to_save disable write",
    saving,
)
def saved_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    trained = train(model, spec)
    model.enable(False)
    gives(check, model, spec, [], "the output, off")
    model.enable(True)
    gives(check, model, trained, [states], "the output, on again")


@requirement(
    "SAVED-005",
    "A module of modules_to_save gets no A and B, though it is targeted too.",
    "N1",
    "model modules_to_save",
    lambda i: saving(i, target_modules=["proj", "up", "head"]),
)
def saved_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    check.equal(sorted(model.adapted()), ["a.proj", "a.up"], "the adapted modules")


@requirement(
    "SAVED-013",
    "A module of modules_to_save and of exclude_modules is saved whole: excluding is about adapters only.",
    "PEFT's documentation of modules_to_save: modules apart from adapter layers; exclude_modules: of the adapter (N1)",
    "model modules_to_save exclude trainable",
    lambda i: saving(i, target_modules=["proj", "up", "head"], exclude_modules=["head", "up"]),
)
def saved_013(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    check.equal(sorted(model.adapted()), ["a.proj"], "the adapted modules")
    check.that("head.weight:default" in model.trainable(), "head has no copy that trains")


@requirement(
    "SAVED-006",
    "Names match whole, or from a dot on: 'head' is not 'xhead'.",
    "lora_ref's decision (N10): PEFT's documentation of modules_to_save calls it a list of modules",
    "model modules_to_save trainable decision:whole_segments",
    lambda i: st.builds(_with_xhead, saving(i)),
)
def saved_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    trains = implementation.model(spec).trainable()
    check.that("head.weight:default" in trains, "head has no copy")
    check.that("xhead.weight:default" not in trains, "xhead has a copy, though modules_to_save names head")


def _with_xhead(spec: ModelSpec) -> ModelSpec:
    head = spec.modules["head"]
    more = type(head)("linear", np.eye(3), np.zeros(3))
    return ModelSpec({**spec.modules, "xhead": more}, spec.config, spec.dtype, spec.seed)


@requirement(
    "SAVED-007",
    "Each adapter has a copy of its own, and setting an adapter sets its copy.",
    DOC,
    "model modules_to_save adapters trainable write",
    saving,
)
def saved_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    first = fill(model, spec)
    one = train(model, spec)
    model.add("other", spec.config)
    second = fill(model, spec, "other", salt=1)
    model.set(["other"])
    gives(check, model, spec, [second], "the output of the other adapter, whose copy is the original still")
    two = train(model, spec, salt=1)
    trains = model.trainable()
    check.that("head.weight:other" in trains, "the active adapter's copy does not train")
    check.that("head.weight:default" not in trains, "the copy of an adapter that is not active trains")
    gives(check, model, two, [second], "the output of the other adapter with its trained copy")
    model.set(["default"])
    gives(check, model, one, [first], "the output of the first adapter again")


@requirement(
    "SAVED-008", "Unloading without merging gives the originals back.", "U6", "model modules_to_save unload", saving
)
def saved_008(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    train(model, spec)
    for name, got in zip("Wb", model.unload(merge=False)["head"], strict=True):
        check.equal(got, getattr(spec.modules["head"], name), f"{name} of head")


@requirement(
    "SAVED-009",
    "Unloading with merging keeps the trained copy: the plain model gives the same output.",
    "U5",
    "model modules_to_save unload merge",
    saving,
)
def saved_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    trained = train(model, spec)
    for name, got in zip("Wb", model.unload(merge=True)["head"], strict=True):
        check.equal(got, getattr(trained.modules["head"], name), f"{name} of head")


@requirement(
    "SAVED-010",
    "Merging and unmerging leave the copies alone.",
    "U1",
    "model modules_to_save merge unmerge write",
    saving,
)
def saved_010(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    trained = train(model, spec)
    model.merge()
    gives(check, model, trained, [states], "the merged output")
    untouched(check, model, spec, "after merging")
    model.unmerge()
    x = model_inputs(spec)
    y, size = output(trained, [states], x)
    check.close(model.forward(x), y, size, spec.dtype, "the output after unmerging", 16.0 * len(spec.modules))


@requirement(
    "SAVED-011",
    "The trained copy is saved and loaded with the adapter.",
    DOC,
    "model modules_to_save files write",
    saving,
    slow=2,
)
def saved_011(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    trained = train(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        again = implementation.load(spec, Path(place))
    gives(check, again, trained, [states], "the output of the loaded adapter")
    untouched(check, again, spec, "after loading")


@requirement(
    "SAVED-012",
    "Deleting an adapter deletes its copies: under its name a new adapter without copies uses the originals.",
    "U7, Z2",
    "model modules_to_save adapters delete write",
    saving,
)
def saved_012(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec.but(modules_to_save=None))
    fill(model, spec)
    model.add("other", spec.config)
    model.set(["other"])
    train(model, spec)
    model.set(["default"])
    model.delete("other")
    model.add("other", spec.but(modules_to_save=None).config)
    again = fill(model, spec, "other", salt=2)
    model.set(["other"])
    gives(check, model, spec, [again], "the output of the new adapter")
