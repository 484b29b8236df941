"""Several adapters are active, of which one is merged or deleted: what acts, what trains, what is saved."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ..check import Check
from ..contract import Implementation, Model, ModelSpec
from ..registry import requirement
from .adapters_named import both, pairs, trained
from .merged_models import near, restored
from .operations import gives, holds, weight

DELETE = "PEFT, PeftModel.delete_adapter: it deletes an existing adapter"
SUM = "PEFT, LoraModel.set_adapter: a list of names makes all of them active"
SOME = "PEFT, BaseTuner.merge_adapter: adapter_names, the list of adapters that are merged"
UNMERGE = "PEFT, BaseTuner.unmerge_adapter: it unmerges all merged layers from the base model"
OFF = 'PEFT, PeftModel.disable_adapter: "Context manager that disables the adapter module"'
UNLOAD = 'PEFT, LoraModel.unload: "Gets back the base model by removing all the lora modules without merging"'
MERGED = "PEFT, LoraModel.merge_and_unload: it merges the LoRA layers into the base model, once"


def half_merged(implementation: Implementation, case: Any) -> tuple[Model, ModelSpec, str, Any, Any]:
    """The model with two active adapters, of which the second is merged."""
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge([name])
    return model, spec, name, first, second


@requirement(
    "SEVERAL-001",
    "After one of two active adapters is deleted, the other is active, acts alone and trains alone.",
    f"{DELETE}; {SUM} (U7)",
    "model write adapters summed delete trainable",
    pairs,
)
def several_001(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, _ = both(implementation, case)
    model.set(["default", name])
    model.delete(name)
    check.equal(model.active(), ["default"], "the active adapters")
    check.equal(sorted(model.trainable()), trained(model, "default"), "what trains")
    gives(check, model, spec, [first], "the output after the deletion")


@requirement(
    "SEVERAL-002",
    "With one of two active adapters merged, a context that disables them gives the base; unmerged, both act again.",
    f"{OFF}; {UNMERGE} (U2, U3)",
    "model write adapters summed merge unmerge disable_context",
    pairs,
)
def several_002(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, first, second = half_merged(implementation, case)
    with model.disabled():
        near(check, model, spec, [], [first, second], "the output inside")
    model.unmerge()
    near(check, model, spec, [first, second], [first, second], "the output after unmerging")


@requirement(
    "SEVERAL-003",
    "Deleting an active adapter while another is merged is refused, or the merged one acts alone.",
    f"{DELETE}; {SOME} (U7)",
    "model write adapters summed delete merge unmerge",
    pairs,
)
def several_003(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, first, second = half_merged(implementation, case)
    deleted = check.accepted(lambda: model.delete("default"))
    if deleted:
        near(check, model, spec, [second], [first, second], "the output after the deletion")
    model.unmerge()
    restored(check, model, spec, [first, second], "W after unmerging")


@requirement(
    "SEVERAL-004",
    "Unloading with merging merges both active adapters, though one of them was merged before.",
    f"{MERGED} (U5)",
    "model write adapters summed merge unload",
    pairs,
)
def several_004(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, first, second = half_merged(implementation, case)
    holds(check, model.unload(merge=True), spec, [first, second], "the unloaded model", factor=16)


@requirement(
    "SEVERAL-005",
    "Unloading without merging gives the base back, though one of two adapters was merged.",
    f"{UNLOAD} (U6)",
    "model write adapters summed merge unload",
    pairs,
)
def several_005(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, first, second = half_merged(implementation, case)
    for name, (W, _) in model.unload(merge=False).items():
        size = weight(spec, name, [first, second])[1]
        check.close(W, spec.modules[name].W, size, spec.dtype, f"the unloaded {name}.weight", 16.0)


@requirement(
    "SEVERAL-006",
    "With one of two adapters merged both are saved as they are: loaded again, they add up.",
    "PEFT, PeftModel.save_pretrained: it saves all adapters, each in a folder of its name (X9)",
    "model write adapters summed merge files",
    lambda i: pairs(i).map(lambda case: (case[0], "second", case[2])),  # a name that no module has
    slow=2,
)
def several_006(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = half_merged(implementation, case)
    with tempfile.TemporaryDirectory() as place:
        if not check.accepted(lambda: model.save(Path(place))):
            return
        loaded = implementation.load(spec, Path(place))
        loaded.load(Path(place) / name, name)
    loaded.set(["default", name])
    gives(check, loaded, spec, [first, second], "the output of both, loaded")


@requirement(
    "SEVERAL-007",
    "Combining a merged adapter with another is refused, or gives the sum of both updates.",
    "PEFT, LoraModel.add_weighted_adapter: cat concatenates the factors of the adapters (U9)",
    "model write adapters summed merge unmerge weighted",
    pairs,
    slow=2,
)
def several_007(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = half_merged(implementation, case)
    made = check.accepted(lambda: model.combine(["default", name], [1.0, 1.0], "sum", "cat"))
    model.unmerge()
    if made:
        model.set(["sum"])
    near(check, model, spec, [first, second], [first, second, first, second], "the output of the sum")


@requirement(
    "SEVERAL-008",
    "Merging and unmerging one of two active adapters leave what is active, and what trains, as they were.",
    f"{SOME}; {UNMERGE} (U3)",
    "model adapters summed merge unmerge trainable write",
    pairs,
)
def several_008(implementation: Implementation, case: Any, check: Check) -> None:
    model, _spec, name, _, _ = both(implementation, case)
    model.set(["default", name])
    trains = sorted(model.trainable())
    model.merge([name])
    check.equal(sorted(model.active()), sorted(["default", name]), "the active adapters while one is merged")
    model.unmerge()
    check.equal(sorted(model.active()), sorted(["default", name]), "the active adapters after unmerging")
    check.equal(sorted(model.trainable()), trains, "what trains after unmerging")


@requirement(
    "SEVERAL-009",
    "With one of two active adapters merged, setting the other alone is refused, or it acts alone.",
    f"PEFT, PeftModel.set_adapter: only the given adapter is active; {UNMERGE} (U3, U7)",
    "model write adapters summed merge unmerge",
    pairs,
)
def several_009(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, first, second = half_merged(implementation, case)
    if check.accepted(lambda: model.set(["default"])):
        near(check, model, spec, [first], [first, second], "the output of the other")
    model.unmerge()
    restored(check, model, spec, [first, second], "W after unmerging")


@requirement(
    "SEVERAL-010",
    "A safe merge that is refused leaves the adapter that was merged before merged, and no other.",
    "lora_ref's decision: an operation that is refused has changed no module (U4)",
    "model write adapters summed merge unmerge safe_merge all_or_nothing",
    pairs,
)
def several_010(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge([name])
    last = list(first)[-1]
    model.write(last, np.full_like(first[last].A, np.nan), first[last].B)
    check.refused(lambda: model.merge(["default"], safe=True), f"merging NaN into {last}")
    holds(check, model.base(), spec, [second], "the merged model after the refusal")
    model.unmerge()
    restored(check, model, spec, [second], "W after unmerging")
