"""Any sequence of operations on adapters of any starts: the machine of `machine`, with a start for each adapter."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, Model, ModelSpec
from ..generate import model_inputs
from ..registry import requirement
from .machine import NAMES, OPERATIONS, Expected, Operation, allowed, apply
from .operations import output, weight
from .starts_meet import FACTOR, MOVES, OURS, OWN, STAYS, Acting, acting, chained, started

STEPS = ("write", "enable", "merge", "unmerge", "set", "delete")
RULES = "PEFT's documentation of each operation (section 1.10)"


class Started(Expected):
    """What the model must be, with what each start took out of W, and whose B is frozen."""

    def __init__(self, spec: ModelSpec, model: Model) -> None:
        super().__init__(spec, model)
        self.taken: dict[str, Any] = {}
        self.inits: dict[str, Any] = {}
        self.begin(model, "default", spec.config["init_lora_weights"])

    def begin(self, model: Model, adapter: str, init: Any) -> None:
        """Note an adapter as it starts."""
        self.adapters[adapter], self.taken[adapter] = acting(model, self.spec, adapter, init, False)
        self.inits[adapter] = init

    def of(self, adapters: Any) -> Acting:
        """The updates of these adapters, and what their starts took."""
        return [part for name in adapters for part in (self.adapters[name], self.taken[name])]

    def acting(self) -> Acting:
        return self.of(self.active) if self.on else []

    def check(self, model: Model, check: Check, after: str) -> None:
        x = model_inputs(self.spec)
        y, size = output(self.spec, self.acting(), x)
        if self.sums:  # rounding that merging left, relative to all that was ever merged
            size = np.maximum(size, output(self.spec, self.of(self.adapters), x)[1])
        factor = FACTOR + 8 * self.sums
        modules = len(self.spec.modules)
        check.close(model.forward(x), y, size, self.spec.dtype, f"the output after {after}", factor * modules)
        if self.on:
            letters = {name: "A" if self.inits[name] == "mica" else "AB" for name in self.active}
            want = sorted(f"{m}.{letter}:{a}" for a in self.active for m in self.adapters[a] for letter in letters[a])
            check.equal(sorted(model.trainable()), want, f"what trains after {after}")
        if self.merged:
            for name, (W, _) in model.base().items():
                want_W, bound = weight(self.spec, name, self.of(self.active))
                bound = np.maximum(bound, weight(self.spec, name, self.of(self.adapters))[1])
                check.close(W, want_W, bound, self.spec.dtype, f"{name}.weight after {after}", factor)


def walk(implementation: Implementation, case: tuple[ModelSpec, list[Operation]], check: Check) -> None:
    spec, operations = case
    model = implementation.model(spec)
    now = Started(spec, model)
    done: list[Operation] = []
    for operation in operations:
        if not allowed(operation, now) or (operation[0] == "delete" and len(now.active) > 1):
            continue  # MEETJOIN-012 deletes beside several active adapters
        if operation[0] == "add":
            _, name, options = operation
            model.add(name, options)
            now.begin(model, name, options["init_lora_weights"])
        else:
            apply(operation, model, now, implementation, check)
        done.append(operation)
        now.check(model, check, " ".join(map(str, done)))


def sequences(implementation: Implementation, inits: tuple[str, ...], first: tuple[str, ...]) -> Any:
    """A model with one of the first starts and a second adapter, and operations that add adapters of any start."""
    second, add = (st.tuples(st.just("add"), name, started(implementation, inits)) for name in (st.just("b"), NAMES))
    steps = st.lists(st.one_of(add, *(OPERATIONS[name] for name in STEPS)), min_size=4, max_size=12)
    return st.tuples(chained(implementation, first), st.builds(lambda one, more: [one, *more], second, steps))


@requirement(
    "MEETSTATE-001",
    "Any sequence of operations on adapters of any starts keeps the model what it must be.",
    RULES,
    "model write adapters summed delete merge unmerge disable trainable init:True",
    lambda i: sequences(i, STAYS, STAYS),
)
def meetstate_001(implementation: Implementation, case: tuple[ModelSpec, list[Operation]], check: Check) -> None:
    walk(implementation, case, check)


@requirement(
    "MEETSTATE-002",
    "The same where starts take parts out of W.",
    OURS,
    f"model write adapters summed delete merge unmerge disable trainable init:True init:pissa {OWN}",
    lambda i: sequences(i, (*STAYS, *MOVES), MOVES),
)
def meetstate_002(implementation: Implementation, case: tuple[ModelSpec, list[Operation]], check: Check) -> None:
    walk(implementation, case, check)
