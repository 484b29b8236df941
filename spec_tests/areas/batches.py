"""Another adapter for each sample of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, ModelSpec
from ..generate import model_inputs
from ..registry import requirement
from .adapters_named import both, pairs
from .operations import fill, gives, output
from .saved_modules import saving, train

DOC = "PEFT's documentation: inference with different adapters in the same batch (U8)"


def drawn(implementation: Implementation) -> Any:
    return st.tuples(pairs(implementation), st.lists(st.integers(0, 2), min_size=1, max_size=5))


@requirement(
    "BATCH-001",
    "Each sample gets what its own adapter gives alone; __base__ is none.",
    DOC,
    "model adapters batch write",
    drawn,
)
def batch_001(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case[0])
    choice = [("default", first), (name, second), ("__base__", None)]
    x = model_inputs(spec, batch=len(case[1]))
    got = model.forward(x, adapter_names=[choice[i][0] for i in case[1]])
    for row, i in enumerate(case[1]):
        states = [] if choice[i][1] is None else [choice[i][1]]
        want, size = output(spec, states, x[row : row + 1])
        what = f"sample {row} with {choice[i][0]}"
        check.close(got[row : row + 1], want, size, spec.dtype, what, 8.0 * len(spec.modules))


@requirement(
    "BATCH-002",
    "Afterwards the model is as before: its own adapter is active.",
    DOC,
    "model adapters batch write",
    drawn,
)
def batch_002(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, _ = both(implementation, case[0])
    x = model_inputs(spec, batch=2)
    model.forward(x, adapter_names=[name, "__base__"])
    check.equal(model.active(), ["default"], "the active adapters")
    gives(check, model, spec, [first], "the output without adapter_names")


@requirement("BATCH-003", "The order of the samples does not matter.", DOC, "model adapters batch write", drawn)
def batch_003(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case[0])
    names = np.array(["default", name, "__base__", name, name])
    x = model_inputs(spec, batch=5)
    y = model.forward(x, adapter_names=list(names))
    turned = model.forward(x[::-1].copy(), adapter_names=list(names[::-1]))[::-1]
    size = output(spec, [first, second], x)[1]
    check.close(turned, y, size, spec.dtype, "the output of the turned batch", 16.0 * len(spec.modules))


def _refused(id: str, what: str, names: Any) -> None:
    @requirement(
        id,
        f"{what} is refused, and the model is as before.",
        DOC,
        "model write adapters batch errors",
        lambda i: pairs(i),
    )
    def body(implementation: Implementation, case: Any, check: Check) -> None:
        model, spec, name, first, _ = both(implementation, case)
        x = model_inputs(spec, batch=2)
        check.refused(lambda: model.forward(x, adapter_names=names(name)), what)
        gives(check, model, spec, [first], "the output after the refusal")


_refused("BATCH-004", "An adapter that does not exist", lambda name: [name, "nobody"])
_refused("BATCH-005", "A list of names that is not as long as the batch", lambda name: [name])


@requirement(
    "BATCH-006",
    "In a merged model, or in training mode, adapter_names is refused: it would be wrong.",
    DOC + " (U3)",
    "model adapters batch merge errors write",
    lambda i: pairs(i),
)
def batch_006(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _, _ = both(implementation, case)
    x = model_inputs(spec, batch=2)
    check.refused(lambda: model.forward(x, train=True, adapter_names=[name, "default"]), "adapter_names in training")
    model.merge()
    check.refused(lambda: model.forward(x, adapter_names=[name, "default"]), "adapter_names in a merged model")


@requirement(
    "BATCH-007",
    "Adapters that adapt different modules can be mixed.",
    DOC,
    "model adapters batch write",
    lambda i: pairs(i),
)
def batch_007(implementation: Implementation, case: Any, check: Check) -> None:
    spec, name, config = case
    model = implementation.model(spec.but(target_modules=["up"]))
    first = fill(model, spec)
    model.add(name, {**config, "target_modules": ["down"]})
    second = fill(model, spec, name, salt=1)
    x = model_inputs(spec, batch=2)
    got = model.forward(x, adapter_names=["default", name])
    for row, states in enumerate((first, second)):
        want, size = output(spec, [states], x[row : row + 1])
        check.close(got[row : row + 1], want, size, spec.dtype, f"sample {row}", 8.0 * len(spec.modules))


@requirement(
    "BATCH-008",
    "Each sample goes through the copies of modules_to_save of its own adapter; __base__ through the originals.",
    DOC + "; PEFT's documentation of modules_to_save (Z2)",
    "model linear adapters batch modules_to_save write",
    lambda i: saving(i).filter(lambda spec: spec.modules["head"].kind == "linear"),
)
def batch_008(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states, trained = {"default": fill(model, spec)}, {"default": train(model, spec), "__base__": spec}
    model.add("other", spec.config)
    states["other"] = fill(model, spec, "other", salt=1)
    model.set(["other"])
    trained["other"] = train(model, spec, salt=1)
    model.set(["default"])
    names = ["other", "__base__", "default"]
    x = model_inputs(spec, batch=len(names))
    got = model.forward(x, adapter_names=names)
    for row, name in enumerate(names):
        active = [states[name]] if name in states else []
        want, size = output(trained[name], active, x[row : row + 1])
        check.close(got[row : row + 1], want, size, spec.dtype, f"the sample of {name}", 8.0 * len(spec.modules))
