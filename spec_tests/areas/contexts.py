"""Contexts in which adapters are off or scaled, and the modes of a model: what holds inside, and what is restored."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, LayerState, Model, ModelSpec
from ..generate import model_inputs
from ..registry import requirement
from .adapters_named import both, pairs, trained
from .operations import fill, gives, holds, small

OFF = 'PEFT, PeftModel.disable_adapter: "Context manager that disables the adapter module" to run inference on the base'
RESTORED = "Python's library reference, contextlib: what a context has changed is restored when it is left"
SCALED = "PEFT, helpers.rescale_adapter_scale: the scaling is multiplied inside, and restored on exit (S4)"
MODES = "torch.nn.Dropout: it drops in training, and is the identity in evaluation (P1, P2)"
MERGED = "LoRA, arXiv 2106.09685, section 4.1: the merged weight is W + B A"


class Left(Exception):
    """Leaves a context."""


@contextmanager
def swallowed() -> Iterator[None]:
    try:
        yield
    except Left:
        return


def times(states: dict[str, LayerState], factor: float) -> dict[str, LayerState]:
    return {name: state._replace(scaling=state.scaling * factor) for name, state in states.items()}


def dropping(implementation: Implementation) -> Any:
    """A model whose adapter drops half of its inputs."""
    return small(implementation, lora_dropout=0.5)


@st.composite
def pairs_that_drop(draw: Any, implementation: Implementation) -> Any:
    """The same, with a second adapter that drops too."""
    spec, name, config = draw(pairs(implementation, lora_dropout=0.5))
    return spec, name, {**config, "lora_dropout": 0.5}


def drops(model: Model, spec: ModelSpec) -> bool:
    """Do two seeds give two outputs, in the mode that the model is in?"""
    x = model_inputs(spec, batch=8)
    return bool((model.forward(x, None, seed=1) != model.forward(x, None, seed=2)).any())


@requirement(
    "CONTEXT-001",
    "Inside a context that disables the adapter the model is the base model; after it, the adapted one.",
    f"{OFF} (U2)",
    "model write disable_context",
    small,
)
def context_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with model.disabled():
        gives(check, model, spec, [], "the output inside")
    gives(check, model, spec, [states], "the output after the context")


@requirement(
    "CONTEXT-002",
    "Contexts may be nested: the adapter stays off until the outermost is left.",
    f"{OFF}; {RESTORED} (U2)",
    "model write disable_context",
    small,
)
def context_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with model.disabled():
        with model.disabled():
            gives(check, model, spec, [], "the output in the inner context")
        gives(check, model, spec, [], "the output after the inner context")
    gives(check, model, spec, [states], "the output after both")


@requirement(
    "CONTEXT-003",
    "An exception that leaves the context switches the adapter on again.",
    RESTORED,
    "model write disable_context",
    small,
)
def context_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with swallowed(), model.disabled():
        raise Left
    gives(check, model, spec, [states], "the output after an exception")


@requirement(
    "CONTEXT-004",
    "After the context the same parameters train as before, and the same adapter is active.",
    f"{OFF}; {RESTORED} (U2)",
    "model write adapters trainable disable_context",
    pairs,
)
def context_004(implementation: Implementation, case: Any, check: Check) -> None:
    model, _spec, name, _, _ = both(implementation, case)
    model.set([name])
    with model.disabled():
        pass
    check.equal(model.active(), [name], "the active adapters after the context")
    check.equal(sorted(model.trainable()), trained(model, name), "what trains after the context")


@requirement(
    "CONTEXT-005",
    "With several active adapters all are off inside the context, and all act after it.",
    f"{OFF}; {RESTORED} (U2, D1)",
    "model write adapters summed disable_context",
    pairs,
)
def context_005(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    with model.disabled():
        gives(check, model, spec, [], "the output inside")
    gives(check, model, spec, [first, second], "the output after the context")


@requirement(
    "CONTEXT-006",
    "A merged model is the base model inside the context, and gives the merged output after it.",
    f"{OFF}; {MERGED} (U2, U3)",
    "model write merge disable_context",
    small,
)
def context_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    with model.disabled():
        gives(check, model, spec, [], "the output inside")
    gives(check, model, spec, [states], "the output after the context")


@requirement(
    "CONTEXT-007",
    "A model that was switched off before the context stays off after it.",
    RESTORED,
    "model write disable disable_context",
    small,
)
def context_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    model.enable(False)
    with model.disabled():
        pass
    gives(check, model, spec, [], "the output after the context")


@requirement(
    "CONTEXT-008",
    "Inside a context of scaling the update is multiplied by its factor; after it, it is as before.",
    SCALED,
    "model write scale_context",
    small,
)
def context_008(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with model.scaled(0.5):
        gives(check, model, spec, [times(states, 0.5)], "the output inside")
    gives(check, model, spec, [states], "the output after the context")


@requirement(
    "CONTEXT-009",
    "Nested contexts of scaling multiply, and each restores what it found.",
    f"{SCALED}; {RESTORED}",
    "model write scale_context",
    small,
)
def context_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with model.scaled(4.0):
        with model.scaled(0.5):
            gives(check, model, spec, [times(states, 2.0)], "the output in the inner context")
        gives(check, model, spec, [times(states, 4.0)], "the output after the inner context")


@requirement(
    "CONTEXT-010",
    "An exception that leaves a context of scaling restores the scaling; so does a factor of 0.",
    f"{SCALED}; {RESTORED}",
    "model write scale_context",
    small,
)
def context_010(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with swallowed(), model.scaled(0.0):
        raise Left
    scaling = {name: model.read(name).scaling for name in states}
    check.equal(scaling, {name: state.scaling for name, state in states.items()}, "s after the context")


@requirement(
    "CONTEXT-011",
    "A context of scaling on a merged model is refused, or unmerging afterwards restores the base weights.",
    f"{SCALED}; {MERGED}, and subtracting B A recovers W (U3)",
    "model write merge unmerge scale_context",
    small,
)
def context_011(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()

    def unmerged_inside() -> bool:
        with model.scaled(4.0):
            model.unmerge()
        return True

    if check.tried(unmerged_inside) is None:
        model.unmerge()
    gives(check, model, spec, [states], "the output after unmerging inside the context")


@requirement(
    "CONTEXT-012",
    "An adapter that is added in evaluation drops nothing there.",
    MODES,
    "model write adapters dropout modes",
    pairs_that_drop,
)
def context_012(implementation: Implementation, case: Any, check: Check) -> None:
    spec, name, config = case
    model = implementation.model(spec)
    fill(model, spec)
    model.train(False)
    model.add(name, config)
    fill(model, spec, name, salt=1)
    model.set([name])
    x = model_inputs(spec)
    y = model.forward(x, None, seed=1)
    check.equal(model.forward(x, None, seed=2), y, "the output of an adapter that was added in evaluation, once more")


@requirement(
    "CONTEXT-013",
    "An adapter that is added in evaluation drops after the model is set to training.",
    MODES,
    "model write adapters dropout modes",
    pairs_that_drop,
)
def context_013(implementation: Implementation, case: Any, check: Check) -> None:
    spec, name, config = case
    model = implementation.model(spec)
    model.train(False)
    model.add(name, config)
    fill(model, spec, name, salt=1)
    model.set([name])
    model.train(True)
    check.that(drops(model, spec), "nothing is dropped in training")


@requirement(
    "CONTEXT-014",
    "Adapting, adding and setting adapters leave the mode of the model as it was.",
    "torch.nn.Module.train and eval: they set the mode of the module and of its children (P1)",
    "model adapters modes",
    pairs,
)
def context_014(implementation: Implementation, case: Any, check: Check) -> None:
    spec, name, config = case
    model = implementation.model(spec)
    for mode in (False, True):
        model.train(mode)
        model.add(f"{name}{mode}", config)
        model.set([f"{name}{mode}"])
        check.that(model.training() == mode, f"the mode after adding and setting an adapter: training is not {mode}")


@requirement(
    "CONTEXT-015",
    "The context that disables the adapter keeps the mode, inside and after it.",
    f"{OFF}; {RESTORED} (U2)",
    "model dropout modes disable_context",
    dropping,
)
def context_015(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    for mode in (False, True):
        model.train(mode)
        with model.disabled():
            check.that(model.training() == mode, f"the mode inside the context: training is not {mode}")
        check.that(model.training() == mode, f"the mode after the context: training is not {mode}")


@requirement(
    "CONTEXT-016",
    "Merging in training mode, with dropout, adds the whole update and keeps the mode.",
    f"{MERGED}; {MODES}",
    "model write merge dropout modes",
    dropping,
)
def context_016(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.train(True)
    model.merge()
    holds(check, model.base(), spec, [states], "the merged model")
    check.that(model.training(), "merging has set the model to evaluation")


@requirement(
    "CONTEXT-017",
    "Combining inside a context of scaling takes the scaling of now into the new adapter.",
    f"{SCALED}; PEFT, LoraModel.add_weighted_adapter: the weighted sum of the adapters' updates (S4, U9)",
    "model write adapters summed weighted scale_context",
    pairs,
    slow=2,
)
def context_017(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    with model.scaled(0.25):
        model.combine(["default", name], [1.0, 1.0], "sum", "cat")
        model.set(["sum"])
        gives(check, model, spec, [times(first, 0.25), times(second, 0.25)], "the output of the combined adapter")


@requirement(
    "CONTEXT-018",
    "Setting another adapter inside the context that disables is refused, or what is active afterwards acts alone.",
    f"{OFF}; PEFT, PeftModel.set_adapter: only the given adapter is active (U2, U7)",
    "model write adapters disable_context",
    pairs,
)
def context_018(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    with model.disabled():
        check.tried(lambda: model.set([name]))
        gives(check, model, spec, [], "the output inside, after setting another adapter")
    acts = {"default": first, name: second}
    gives(check, model, spec, [acts[model.active()[0]]], "the output after the context")


@requirement(
    "CONTEXT-019",
    "A model that was loaded to be used trains nothing after a context that disables its adapter.",
    f"{OFF}; PEFT, PeftModel.from_pretrained: is_trainable=False freezes the adapter (U2, X9)",
    "model write files trainable disable_context",
    small,
    slow=2,
)
def context_019(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        loaded = implementation.load(spec, Path(place))
    with loaded.disabled():
        check.equal(sorted(loaded.trainable()), [], "what trains inside")
    check.equal(sorted(loaded.trainable()), [], "what trains after the context")


@requirement(
    "CONTEXT-020",
    "A context of scaling that an exception leaves keeps what is active, and what trains.",
    f"{SCALED}; {RESTORED}",
    "model adapters trainable scale_context write",
    pairs,
)
def context_020(implementation: Implementation, case: Any, check: Check) -> None:
    model, _spec, name, _, _ = both(implementation, case)
    model.set([name])
    with swallowed(), model.scaled(2.0):
        raise Left
    check.equal(model.active(), [name], "the active adapters after the context")
    check.equal(sorted(model.trainable()), trained(model, name), "what trains after the context")


@requirement(
    "CONTEXT-021",
    "An exception that leaves the context leaves what trains, and the mode, as they were.",
    f"{OFF}; {RESTORED} (U2)",
    "model write adapters trainable modes disable_context",
    pairs,
)
def context_021(implementation: Implementation, case: Any, check: Check) -> None:
    model, _spec, name, _, _ = both(implementation, case)
    model.set([name])
    model.train(True)
    with swallowed(), model.disabled():
        raise Left
    check.equal(sorted(model.trainable()), trained(model, name), "what trains after an exception")
    check.that(model.training(), "the mode after an exception: training has ended")


@requirement(
    "CONTEXT-022",
    "Adding an adapter in a context of scaling is refused, or it has its configuration's scaling afterwards.",
    f"{SCALED}; PEFT, PeftModel.add_adapter: it adds an adapter by its configuration (S1)",
    "model adapters scale_context",
    pairs,
)
def context_022(implementation: Implementation, case: Any, check: Check) -> None:
    spec, name, config = case
    model = implementation.model(spec)
    with model.scaled(0.5):
        if not check.accepted(lambda: model.add(name, config)):
            return
        inside = sorted(model.adapted(name))
    check.equal(sorted(model.adapted(name)), inside, "the modules that have the added adapter, after the context")
    root = 0.5 if config.get("use_rslora") else 1.0
    for module, (r, s) in model.adapted(name).items():
        check.close(s, config["lora_alpha"] / r**root, config["lora_alpha"], "float64", f"s of {name} in {module}")
