"""An adapter that EVA started from inputs of the model, beside a second adapter of any start."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation
from ..generate import claimed, model_inputs
from ..registry import requirement
from .starts_meet import STAYS, acting, alone, chained, runs, started, without_roots

EVA = "EVA, arXiv 2410.07170: the base model stays as it is, A is replaced; PEFT's documentation of set_adapter (E6)"
ROWS = 24


def drawn(implementation: Implementation) -> Any:
    claimed(implementation, ["init:eva"])
    return st.tuples(chained(implementation, ("True",)), started(implementation, STAYS))


@requirement(
    "MEETDATA-001",
    "An adapter of EVA and a second of any start act alone, in a batch, and not at all, as others do.",
    EVA,
    "model write adapters batch disable eva_ranks init:eva init:True",
    drawn,
    slow=2,
)
def meetdata_001(implementation: Implementation, case: Any, check: Check) -> None:
    spec, second = case
    every = {"target_modules": ["proj", "up", "head"], "eva_config": {"rho": 1.0}} | without_roots(implementation)
    model = implementation.model(spec.but(init_lora_weights="eva", **every))
    model.look([model_inputs(spec, batch=ROWS, salt=3)])
    first = acting(model, spec, "default", "eva", True)
    model.add("other", second)
    other = acting(model, spec, "other", second["init_lora_weights"], True, salt=1)
    x = model_inputs(spec, batch=2)
    runs(check, model.forward(x), spec, first, x, "the output with EVA's adapter")
    model.set(["other"])
    runs(check, model.forward(x), spec, other, x, "the output with the second adapter")
    got = model.forward(x, adapter_names=["default", "__base__"])
    runs(check, got[:1], spec, first, x[:1], "the row of EVA's adapter")
    model.set(["default"])
    model.enable(False)
    want = alone(implementation, spec.but(**without_roots(implementation)), x)
    check.equal(model.forward(x), want, "the output with EVA's adapter switched off")
