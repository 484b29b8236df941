"""What happens to a model while it is merged: each operation is refused, or does what it does to an unmerged one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, LayerState, Model, ModelSpec
from ..generate import layers, model_inputs, reals
from ..registry import requirement
from .adapters_named import both, pairs
from .forward import made
from .merging import merged
from .operations import fill, output, small, weight

MERGED = "LoRA, arXiv 2106.09685, section 4.1: W + B A is stored, and W is recovered by subtracting B A (U1, U3)"
ADD = "PEFT, PeftModel.add_adapter: the new adapter is not set as the active one (U7)"
SAVE = "PEFT, PeftModel.save_pretrained: the files of the adapter hold its parameters (X9)"

States = list[dict[str, LayerState]]


def near(check: Check, model: Model, spec: ModelSpec, states: States, every: States, what: str) -> None:
    """The output is that of `states`; the roundings may be those of all adapters that were ever merged."""
    x = model_inputs(spec)
    want, size = output(spec, states, x)[0], output(spec, every, x)[1]
    check.close(model.forward(x), want, size, spec.dtype, what, 24.0 * len(spec.modules))


def restored(check: Check, model: Model, spec: ModelSpec, every: States, what: str) -> None:
    """The base weights are what they were, within the roundings of all adapters that were ever merged."""
    for name, (W, _) in model.base().items():
        check.close(W, spec.modules[name].W, weight(spec, name, every)[1], spec.dtype, f"{what}: {name}", 24.0)


def written(model: Model, spec: ModelSpec, adapter: str, salt: int) -> dict[str, LayerState] | None:
    """New factors for an adapter, or None where that is refused."""
    try:
        return fill(model, spec, adapter, salt)
    except NotImplementedError:
        raise
    except Exception:
        return None


@requirement(
    "MERGED-001",
    "Writing A and B of a merged layer is refused, or unmerging restores W and the new update acts.",
    MERGED,
    "write merge unmerge",
    lambda i: layers(i),
)
def merged_001(implementation: Implementation, spec: Any, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merge()
    rng = np.random.default_rng([spec.seed, 3])
    A, B = reals(rng, state.A.shape), reals(rng, state.B.shape)
    new = state._replace(A=A, B=B) if check.accepted(lambda: layer.write(A, B)) else state
    layer.unmerge()
    size = merged(spec, state)[1] + merged(spec, new)[1]
    layer.merge()
    check.close(layer.read().W, merged(spec, new)[0], 2 * size, spec.dtype, "W merged again", 24.0)


@requirement(
    "MERGED-002",
    "Rescaling a merged layer is refused, or unmerging restores W and the new scaling acts.",
    f"{MERGED}; PEFT, LoraLayer.set_scale and scale_layer (S4)",
    "write merge unmerge rescale",
    lambda i: st.tuples(layers(i), st.sampled_from(("set", "scale"))),
)
def merged_002(implementation: Implementation, case: Any, check: Check) -> None:
    spec, how = case
    layer, state = made(implementation, spec)
    layer.merge()
    new = state._replace(scaling=4 * state.scaling) if check.accepted(lambda: layer.rescale(how, 4.0)) else state
    layer.unmerge()
    size = merged(spec, state)[1] + merged(spec, new)[1]
    layer.merge()
    check.close(layer.read().W, merged(spec, new)[0], 2 * size, spec.dtype, "W merged again", 24.0)


@requirement(
    "MERGED-003",
    "An adapter that is added to a merged model leaves the merged output alone, or is refused.",
    f"{ADD}; {MERGED}",
    "model write adapters merge unmerge",
    pairs,
)
def merged_003(implementation: Implementation, case: Any, check: Check) -> None:
    spec, name, config = case
    model = implementation.model(spec)
    first = fill(model, spec)
    model.merge()
    if not check.accepted(lambda: model.add(name, config)):
        near(check, model, spec, [first], [first], "the output after the refusal")
        return
    second = fill(model, spec, name, salt=1)
    near(check, model, spec, [first], [first], "the merged output with another adapter there")
    model.unmerge()
    model.set([name])
    near(check, model, spec, [second], [first, second], "the output of the added adapter")


@requirement(
    "MERGED-004",
    "An adapter that is loaded into a merged model leaves the merged output alone, or is refused.",
    f"PEFT, PeftModel.load_adapter: the adapter is not activated; {MERGED}",
    "model write merge unmerge adapters files",
    small,
    slow=2,
)
def merged_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    first = fill(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        other = fill(model, spec, salt=1)
        model.merge()
        if not check.accepted(lambda: model.load(Path(place), "loaded")):
            near(check, model, spec, [other], [other], "the output after the refusal")
            return
    near(check, model, spec, [other], [other], "the merged output with a loaded adapter there")
    model.unmerge()
    model.set(["loaded"])
    near(check, model, spec, [first], [first, other], "the output of the loaded adapter")


@requirement(
    "MERGED-005",
    "Deleting an adapter that is not merged leaves the merged output alone, or is refused; unmerging restores W.",
    f"PEFT, PeftModel.delete_adapter: it deletes an existing adapter; {MERGED} (U7)",
    "model write adapters delete merge unmerge",
    pairs,
)
def merged_005(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, _ = both(implementation, case)
    model.merge()
    check.tried(lambda: model.delete(name))
    near(check, model, spec, [first], [first], "the merged output after the deletion")
    model.unmerge()
    restored(check, model, spec, [first], "W after unmerging")


@requirement(
    "MERGED-006",
    "A merged model is saved as the unmerged one: the same adapter comes out of the folder.",
    f"{SAVE}; {MERGED}",
    "model write merge files",
    small,
    slow=2,
)
def merged_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    with tempfile.TemporaryDirectory() as place:
        if check.accepted(lambda: model.save(Path(place))):
            near(check, implementation.load(spec, Path(place)), spec, [states], [states], "the output after loading")
    near(check, model, spec, [states], [states], "the output of the saved model")


@requirement(
    "MERGED-007",
    "Adapters that are merged by name, one after the other, are all taken out by one unmerge.",
    f"PEFT, PeftModel.merge_adapter: adapter_names; {MERGED}",
    "model write adapters merge unmerge summed",
    pairs,
)
def merged_007(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge(["default"])
    model.merge([name])
    near(check, model, spec, [first, second], [first, second], "the output with both merged")
    model.unmerge()
    restored(check, model, spec, [first, second], "W after unmerging")


@requirement(
    "MERGED-008",
    "An adapter that is written while another is merged acts with its new factors, once it is set.",
    MERGED,
    "model write adapters merge unmerge",
    pairs,
)
def merged_008(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.merge(["default"])
    second = written(model, spec, name, 2) or second
    near(check, model, spec, [first], [first], "the merged output")
    model.unmerge()
    model.set([name])
    near(check, model, spec, [second], [first, second], "the output of the written adapter")


@requirement(
    "MERGED-009",
    "Writing a merged model's factors is refused, or after unmerging the new update acts alone.",
    MERGED,
    "model write merge unmerge",
    small,
)
def merged_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    first = fill(model, spec)
    model.merge()
    new = written(model, spec, "default", 1) or first
    model.unmerge()
    near(check, model, spec, [new], [first, new], "the output after unmerging")


def _kept(act: Callable[[Model, Any], Any]) -> Any:
    """A body: the act leaves a merged model's output alone, refused or not, and unmerging restores W."""

    def body(implementation: Implementation, case: Any, check: Check) -> None:
        model, spec, _, first, second = both(implementation, case)
        model.merge()
        check.tried(lambda: act(model, case))
        near(check, model, spec, [first], [first, second], "the merged output afterwards")
        model.unmerge()
        restored(check, model, spec, [first, second], "W after unmerging")

    return body


@requirement(
    "MERGED-010",
    "Combining adapters of a merged model leaves its output alone, or is refused; unmerging restores W.",
    f"PEFT, LoraModel.add_weighted_adapter: it adds a new adapter; {MERGED} (U9)",
    "model write adapters merge unmerge weighted",
    pairs,
    slow=2,
)
def merged_010(implementation: Implementation, case: Any, check: Check) -> None:
    _kept(lambda model, case: model.combine(["default", case[1]], [1.0, 0.5], "sum", "cat"))(
        implementation, case, check
    )


@requirement(
    "MERGED-011",
    "Switching a merged model off and on leaves its output alone; unmerging restores W.",
    f"PEFT, PeftModel.disable_adapter; {MERGED} (U2)",
    "model write adapters merge unmerge disable",
    pairs,
)
def merged_011(implementation: Implementation, case: Any, check: Check) -> None:
    def off_and_on(model: Model, case: Any) -> None:
        model.enable(False)
        model.enable(True)

    _kept(off_and_on)(implementation, case, check)


@requirement(
    "MERGED-012",
    "A pass in training mode leaves a merged model merged, with the same output; unmerging restores W.",
    f"{MERGED}; torch.nn.Module.train sets a mode, and no weight",
    "model write adapters merge unmerge modes",
    pairs,
)
def merged_012(implementation: Implementation, case: Any, check: Check) -> None:
    def train(model: Model, case: Any) -> None:
        model.train(True)
        model.forward(model_inputs(case[0]), None)
        model.train(False)

    _kept(train)(implementation, case, check)


@requirement(
    "MERGED-013",
    "Setting another adapter on a merged model is refused, or that adapter acts alone.",
    f"PEFT, PeftModel.set_adapter: only the given adapter is active; {MERGED} (U3, U7)",
    "model write adapters merge unmerge",
    pairs,
)
def merged_013(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.merge()
    acts = second if check.accepted(lambda: model.set([name])) else first
    near(check, model, spec, [acts], [first, second], "the output after setting another adapter")


@requirement(
    "MERGED-014",
    "A merge of all active adapters adds those that were not merged yet, once each.",
    f"PEFT, PeftModel.merge_adapter: it merges the active adapters; {MERGED}",
    "model write adapters merge summed",
    pairs,
)
def merged_014(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge([name])
    model.merge()
    near(check, model, spec, [first, second], [first, second], "the output with both merged")


@requirement(
    "MERGED-015",
    "Setting s of a merged adapter of a model is refused, or the output follows, merged and unmerged.",
    f"{MERGED}; PEFT, LoraLayer.set_scale (S4)",
    "model write merge unmerge model:rescale",
    lambda i: st.tuples(small(i), st.sampled_from((-1.0, 0.5, 4.0))),
)
def merged_015(implementation: Implementation, case: Any, check: Check) -> None:
    spec, factor = case
    model = implementation.model(spec)
    old = fill(model, spec)
    model.merge()
    accepted = check.accepted(lambda: model.rescale("default", factor))
    new = {name: state._replace(scaling=factor * state.scaling) for name, state in old.items()} if accepted else old
    near(check, model, spec, [new], [old, new], "the merged output")
    model.unmerge()
    near(check, model, spec, [new], [old, new], "the output after unmerging")
