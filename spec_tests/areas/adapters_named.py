"""Several named adapters in one model: adding, switching, deleting, merging some of them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, Model, ModelSpec
from ..generate import ALPHAS, model_inputs
from ..registry import requirement
from .operations import fill, gives, holds, output, small, weight

ADD = 'PEFT\'s documentation of add_adapter: "it is not set as the active adapter" (U7)'
SET = "PEFT's documentation of set_adapter: the other adapters are switched off, and do not train (U7)"
SUM = "PEFT's documentation of set_adapter with several names (U7, D1)"
NAMES = ("other", "a", "default2", "proj", "up", "lora", "weight_1")  # module names, and parts of one another


@st.composite
def pairs(draw: Any, implementation: Implementation, **config: Any) -> tuple[ModelSpec, str, dict[str, Any]]:
    """A model, the name of a second adapter, and its configuration: another rank, alpha and scaling, fewer modules."""
    spec = draw(small(implementation, **config))
    second: dict[str, Any] = {
        "r": draw(st.sampled_from((1, 2, 4))),
        "lora_alpha": draw(st.sampled_from(ALPHAS)),
        "target_modules": draw(st.sampled_from((["proj", "down"], list(spec.config["target_modules"])))),
    }
    if "rslora" in implementation.claims:
        second["use_rslora"] = draw(st.booleans())
    return spec, draw(st.sampled_from(NAMES)), second


def both(implementation: Implementation, case: Any) -> tuple[Model, ModelSpec, str, Any, Any]:
    """The model with two filled adapters; the first is active."""
    spec, name, config = case
    model = implementation.model(spec)
    first = fill(model, spec)
    model.add(name, config)
    return model, spec, name, first, fill(model, spec, name, salt=1)


def trained(model: Model, *adapters: str) -> list[str]:
    return sorted(f"{m}.{letter}:{adapter}" for adapter in adapters for m in model.adapted(adapter) for letter in "AB")


@requirement(
    "ADAPTER-001",
    "A second adapter is neither active nor trained when it is added.",
    ADD,
    "model adapters trainable write",
    pairs,
)
def adapter_001(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _name, first, _ = both(implementation, case)
    check.equal(model.active(), ["default"], "the active adapters")
    check.equal(sorted(model.trainable()), trained(model, "default"), "what trains")
    gives(check, model, spec, [first], "the output")


@requirement(
    "ADAPTER-002", "The adapter that is set acts alone, and trains alone.", SET, "model adapters trainable write", pairs
)
def adapter_002(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set([name])
    check.equal(model.active(), [name], "the active adapters")
    check.equal(sorted(model.trainable()), trained(model, name), "what trains")
    gives(check, model, spec, [second], "the output with the second adapter")
    model.set(["default"])
    check.equal(sorted(model.trainable()), trained(model, "default"), "what trains, back again")
    gives(check, model, spec, [first], "the output, back again")


@requirement("ADAPTER-003", "Of several active adapters the updates add up.", SUM, "model adapters summed write", pairs)
def adapter_003(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    for order in (["default", name], [name, "default"]):
        model.set(order)
        gives(check, model, spec, [first, second], f"the output with {order} active")
        check.equal(sorted(model.active()), sorted(order), "the active adapters")


@requirement(
    "ADAPTER-004",
    "Each adapter has its own r and s.",
    "PEFT: a LoraConfig for each adapter (S1)",
    "model adapters write",
    pairs,
)
def adapter_004(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _, _ = both(implementation, case)
    for adapter, config in (("default", spec.config), (name, case[2])):
        r, root = config["r"], 0.5 if config.get("use_rslora") else 1.0
        for module, (rank, s) in model.adapted(adapter).items():
            check.equal(rank, r, f"the rank of {adapter} in {module}")
            want = config["lora_alpha"] / r**root
            check.close(s, want, abs(want), "float64", f"s of {adapter} in {module}")


@requirement(
    "ADAPTER-005", "Setting the factors of one adapter leaves the other's alone.", SUM, "model adapters write", pairs
)
def adapter_005(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, _second = both(implementation, case)
    fill(model, spec, name, salt=2)
    for module, state in first.items():
        again = model.read(module)
        for letter in "AB":
            check.equal(getattr(again, letter), getattr(state, letter), f"{letter} of default in {module}")


@requirement(
    "ADAPTER-006",
    "Deleting an adapter that is not active changes nothing else.",
    "U7",
    "model adapters delete trainable write",
    pairs,
)
def adapter_006(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, _ = both(implementation, case)
    model.delete(name)
    check.equal(model.active(), ["default"], "the active adapters")
    check.equal(sorted(model.trainable()), trained(model, "default"), "what trains")
    gives(check, model, spec, [first], "the output")
    for module, state in first.items():
        check.equal(model.read(module).A, state.A, f"A of default in {module}")


@requirement(
    "ADAPTER-007",
    "After the active adapter is deleted another can be set, and acts alone.",
    "U7",
    "model adapters delete trainable write",
    pairs,
)
def adapter_007(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _, second = both(implementation, case)
    model.delete("default")
    model.set([name])
    check.equal(sorted(model.trainable()), trained(model, name), "what trains")
    gives(check, model, spec, [second], "the output")


@requirement(
    "ADAPTER-008",
    "A deleted adapter's name can be used again, for an adapter of another rank.",
    "U7",
    "model adapters delete write",
    pairs,
)
def adapter_008(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _first, _ = both(implementation, case)
    model.delete(name)
    model.add(
        name,
        {**case[2], "r": 3, "lora_alpha": 6.0, "use_rslora": False}
        if "rslora" in implementation.claims
        else {**case[2], "r": 3, "lora_alpha": 6.0},
    )
    again = fill(model, spec, name, salt=3)
    check.equal({r for r, _ in model.adapted(name).values()} | {3}, {3}, "the ranks of the new adapter")
    model.set([name])
    gives(check, model, spec, [again], "the output with the new adapter")


@requirement(
    "ADAPTER-009",
    "Merging merges the active adapter, and not the others.",
    "U1",
    "model adapters merge unmerge write",
    pairs,
)
def adapter_009(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set([name])
    model.merge()
    holds(check, model.base(), spec, [second], "the merged model")
    gives(check, model, spec, [second], "the merged output")
    model.unmerge()
    model.set(["default"])
    gives(check, model, spec, [first], "the output of the other adapter afterwards")


@requirement(
    "ADAPTER-010",
    "Several active adapters are merged together.",
    "U1",
    "model adapters merge summed unmerge write",
    pairs,
)
def adapter_010(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge()
    holds(check, model.base(), spec, [first, second], "the merged model", factor=16)
    gives(check, model, spec, [first, second], "the merged output")
    model.unmerge()
    for module, (W, _) in model.base().items():
        _, size = weight(spec, module, [first, second])
        check.close(W, spec.modules[module].W, size, spec.dtype, f"the unmerged {module}.weight", factor=32)


@requirement(
    "ADAPTER-011",
    "Adapters can be merged by name, one after the other.",
    "PEFT's documentation of merge_adapter (U1)",
    "model adapters merge summed write",
    pairs,
)
def adapter_011(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge([name])
    holds(check, model.base(), spec, [second], "the model with the second adapter merged")
    model.merge(["default"])
    holds(check, model.base(), spec, [first, second], "the model with both merged", factor=16)
    gives(check, model, spec, [first, second], "the merged output")


@requirement(
    "ADAPTER-012",
    "Where one of two active adapters is merged, the other still acts.",
    "D1, U1",
    "model adapters merge partial_merge summed write",
    pairs,
)
def adapter_012(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge([name])
    gives(check, model, spec, [first, second], "the output with one of two adapters merged")


@requirement(
    "ADAPTER-013",
    "Setting another adapter on a merged model gives that adapter's output alone.",
    "U3",
    "model adapters merge write",
    pairs,
)
def adapter_013(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.merge()
    try:
        model.set([name])
    except Exception:
        return  # refusing is as good: nothing wrong is computed
    x = model_inputs(spec)
    want, size = output(spec, [second], x)[0], output(spec, [first, second], x)[1]
    check.close(model.forward(x), want, size, spec.dtype, "the output", 24.0 * len(spec.modules))


@requirement(
    "ADAPTER-014",
    "Switching off and on again keeps what is active, what trains and what is frozen.",
    "PEFT's documentation of disable_adapter (U2)",
    "model adapters disable trainable write",
    pairs,
)
def adapter_014(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _first, second = both(implementation, case)
    model.set([name])
    model.enable(False)
    gives(check, model, spec, [], "the output, off")
    model.enable(True)
    check.equal(model.active(), [name], "the active adapters")
    check.equal(sorted(model.trainable()), trained(model, name), "what trains")
    gives(check, model, spec, [second], "the output, on again")


@requirement(
    "ADAPTER-015",
    "Unloading with merging merges the active adapters alone.",
    "PEFT's documentation of merge_and_unload (U5)",
    "model adapters merge unload write",
    pairs,
)
def adapter_015(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _, second = both(implementation, case)
    model.set([name])
    holds(check, model.unload(merge=True), spec, [second], "the merged and unloaded model")


def _unknown(id: str, what: str, call: Any, needs: str = "") -> None:
    @requirement(
        id,
        f"{what} an adapter that does not exist is refused, and nothing changes.",
        "PEFT's documentation of set_adapter: the adapter must be loaded first; delete_adapter: an existing one (U7)",
        f"model write adapters errors {needs}",
        pairs,
    )
    def body(implementation: Implementation, case: Any, check: Check) -> None:
        model, spec, _name, first, _ = both(implementation, case)
        check.refused(lambda: call(model), f"{what} an adapter that does not exist")
        check.equal(model.active(), ["default"], "the active adapters after the refusal")
        gives(check, model, spec, [first], "the output after the refusal")


_unknown("ADAPTER-016", "Setting", lambda model: model.set(["nobody"]))
_unknown("ADAPTER-017", "Deleting", lambda model: model.delete("nobody"), "delete")


@requirement(
    "ADAPTER-018",
    "Adding an adapter under a name that is taken is refused, and the first one stays as it is.",
    "PEFT's documentation of add_adapter: the name must be unique",
    "model adapters errors write",
    pairs,
)
def adapter_018(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _first, second = both(implementation, case)
    check.refused(lambda: model.add(name, case[2]), "adding an adapter under a name that is taken")
    model.set([name])
    gives(check, model, spec, [second], "the output of the adapter that was there")


@requirement(
    "ADAPTER-019",
    "Switching a model off and on again, that is loaded to be used, does not make anything train.",
    "PEFT's documentation of disable_adapter, and of is_trainable (U2, X9)",
    "model disable files trainable write",
    small,
    slow=2,
)
def adapter_019(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    fill(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        loaded = implementation.load(spec, Path(place))
    loaded.enable(False)
    loaded.enable(True)
    check.equal(sorted(loaded.trainable()), [], "what trains")


def _targets(spec: ModelSpec) -> dict[str, Any]:
    return {"target_modules": list(spec.config["target_modules"])}


@requirement(
    "ADAPTER-020",
    "Deleting a merged adapter is refused, or takes its update out of the weights.",
    "U7, U3: a deleted adapter has no effect",
    "model adapters merge delete write",
    pairs,
)
def adapter_020(implementation: Implementation, case: Any, check: Check) -> None:
    spec, name, config = case
    model, spec, name, first, second = both(implementation, (spec, name, {**config, **_targets(spec)}))
    model.merge()
    try:
        model.delete("default")
    except Exception:
        gives(check, model, spec, [first], "the output after the refusal")
        return
    x = model_inputs(spec)
    active = [second] if name in model.active() else []
    want, size = output(spec, active, x)[0], output(spec, [first, second], x)[1]
    check.close(model.forward(x), want, size, spec.dtype, f"the output, {len(active)} active", 24.0 * len(spec.modules))


@requirement(
    "ADAPTER-021",
    "The adapter that takes over when the active one is deleted trains, as the deleted one did.",
    "U7: what is active is what trains",
    "model adapters delete trainable write",
    pairs,
)
def adapter_021(implementation: Implementation, case: Any, check: Check) -> None:
    model, _spec, _name, _, _ = both(implementation, case)
    model.delete("default")
    check.equal(sorted(model.trainable()), trained(model, *model.active()), "what trains")
