"""Any sequence of operations: a model is driven through it next to a model of it in a few lines of NumPy.

A sequence is a list of operations, so that a failing one shrinks to the shortest, and prints.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, LayerState, Model, ModelSpec
from ..generate import ALPHAS, model_inputs, reals
from ..registry import requirement
from .operations import output, small, weight

Operation = tuple[Any, ...]
NAMES = st.sampled_from(("default", "b", "c"))
OPERATIONS: dict[str, st.SearchStrategy[Operation]] = {
    "write": st.tuples(st.just("write"), NAMES, st.integers(0, 99)),
    "enable": st.tuples(st.just("enable"), st.booleans()),
    "merge": st.tuples(st.just("merge")),
    "unmerge": st.tuples(st.just("unmerge")),
    "add": st.tuples(st.just("add"), NAMES, st.sampled_from((1, 2, 3)), st.sampled_from(ALPHAS)),
    "set": st.tuples(st.just("set"), st.lists(NAMES, min_size=1, max_size=2, unique=True)),
    "delete": st.tuples(st.just("delete"), NAMES),
    "combine": st.tuples(st.just("combine"), NAMES, NAMES, st.sampled_from((1.0, 0.5, -2.0))),
    "reload": st.tuples(st.just("reload")),
}
NEEDS = {
    "enable": "disable",
    "merge": "merge",
    "unmerge": "unmerge",
    "add": "adapters",
    "set": "adapters",
    "delete": "delete",
    "combine": "weighted",
    "reload": "files",
}


class Expected:
    """What the model must be: its adapters, which are active and merged, whether it is on."""

    def __init__(self, spec: ModelSpec, model: Model) -> None:
        self.spec = spec
        self.adapters = {"default": states(model, "default")}
        self.active, self.on, self.merged, self.sums = ["default"], True, False, 0
        self.largest = {name: abs(module.W) for name, module in spec.modules.items()}  # bounds of what was merged

    def merge(self) -> None:
        """Each rounding of a merge is relative to what was added then: later adapters may be smaller."""
        self.merged, self.sums = True, self.sums + 1
        for name, bound in self.largest.items():
            now = weight(self.spec, name, [self.adapters[adapter] for adapter in self.active])[1]
            self.largest[name] = np.maximum(bound, now)

    def acting(self) -> list[dict[str, LayerState]]:
        return [self.adapters[name] for name in self.active] if self.on else []

    def check(self, model: Model, check: Check, after: str) -> None:
        x = model_inputs(self.spec)
        y, size = output(self.spec, self.acting(), x)
        if self.merged or self.sums:  # rounding that merging left, relative to all that was ever merged
            size = output(self.spec, self.acting(), x, self.largest)[1]
        factor = (8.0 + 8 * self.sums) * len(self.spec.modules)
        check.close(model.forward(x), y, size, self.spec.dtype, f"the output after {after}", factor)
        check.equal(sorted(model.active()), sorted(self.active), f"the active adapters after {after}")
        if self.on:
            want = sorted(f"{m}.{letter}:{a}" for a in self.active for m in self.adapters[a] for letter in "AB")
            check.equal(sorted(model.trainable()), want, f"what trains after {after}")
        merged = [self.adapters[name] for name in self.active] if self.merged else []
        for name, (W, _) in model.base().items():
            want_W, bound = weight(self.spec, name, merged)
            bound = np.maximum(bound, self.largest[name])
            if not self.sums:
                check.equal(W, want_W, f"{name}.weight after {after}")
            else:
                check.close(W, want_W, bound, self.spec.dtype, f"{name}.weight after {after}", 8.0 + 8 * self.sums)


def states(model: Model, adapter: str) -> dict[str, LayerState]:
    return {name: model.read(name, adapter) for name in model.adapted(adapter)}


def allowed(operation: Operation, now: Expected) -> bool:
    """What every library can do: on a merged model nothing but unmerging. (MODEL-008: switching it off.)"""
    what, *rest = operation
    if now.merged:
        return what == "unmerge"
    if what == "enable":
        return True
    if not now.on or what == "unmerge":
        return False
    if what == "add":
        return rest[0] not in now.adapters
    if what == "write":
        return rest[0] in now.adapters
    if what == "set":
        return set(rest[0]) <= now.adapters.keys()
    if what == "delete":
        return rest[0] in now.adapters and rest[0] not in now.active
    if what == "combine":
        return rest[0] in now.adapters and rest[1] not in now.adapters
    if what == "reload":
        return now.active == ["default"] and len(now.adapters) == 1
    return True


def apply(operation: Operation, model: Model, now: Expected, implementation: Implementation, check: Check) -> Model:
    """Do it on both."""
    what, *rest = operation
    if what == "write":
        rng = np.random.default_rng(rest[1])
        for name, state in now.adapters[rest[0]].items():
            model.write(name, reals(rng, state.A.shape), reals(rng, state.B.shape) / 2, rest[0])
        now.adapters[rest[0]] = states(model, rest[0])
    elif what == "enable":
        model.enable(rest[0])
        now.on = rest[0]
    elif what == "merge":
        model.merge()
        now.merge()
    elif what == "unmerge":
        model.unmerge()
        now.merged, now.sums = False, now.sums + 1
    elif what == "add":
        model.add(rest[0], {**now.spec.config, "r": rest[1], "lora_alpha": rest[2]})
        now.adapters[rest[0]] = states(model, rest[0])
    elif what == "set":
        model.set(rest[0])
        now.active = list(rest[0])
    elif what == "delete":
        model.delete(rest[0])
        del now.adapters[rest[0]]
    elif what == "combine":
        model.combine([rest[0]], [rest[2]], rest[1], "cat")
        parent = now.adapters[rest[0]]
        # its update is known, its factors are not: keep the known one, split as the parent is
        now.adapters[rest[1]] = {n: s._replace(B=rest[2] * s.B) for n, s in parent.items()}
        check.same_set(model.adapted(rest[1]), parent, f"the modules of the combination {rest[1]}")
    elif what == "reload":
        with tempfile.TemporaryDirectory() as place:
            model.save(Path(place))
            model = implementation.load(now.spec, Path(place))
        model.set(["default"])
    return model


def sequences(implementation: Implementation, *more: str) -> Any:
    """A model, and operations of these names as far as they are claimed."""
    names = [n for n in ("write", *more) if n not in NEEDS or NEEDS[n] in implementation.claims]
    kinds = {name: OPERATIONS[name] for name in names}
    if "set" in kinds and "summed" not in implementation.claims:
        kinds["set"] = st.tuples(st.just("set"), st.tuples(NAMES).map(list))
    steps = st.lists(st.one_of(list(kinds.values())), min_size=2, max_size=12)
    return st.tuples(small(implementation, lora_alpha=st.sampled_from(ALPHAS)), steps)


def _walk(id: str, sentence: str, needs: str, *more: str) -> None:
    @requirement(
        id,
        sentence,
        "PEFT's documentation of each operation (U1, U2, U7, U9, X2)",
        needs,
        lambda i: sequences(i, *more),
        slow=2,
    )
    def body(implementation: Implementation, case: tuple[ModelSpec, list[Operation]], check: Check) -> None:
        spec, operations = case
        model = implementation.model(spec)
        now = Expected(spec, model)
        done: list[Operation] = []
        for operation in operations:
            if allowed(operation, now):
                model = apply(operation, model, now, implementation, check)
                done.append(operation)
                now.check(model, check, " ".join(map(str, done)))


_walk(
    "STATE-001",
    "Any sequence of setting factors, merging, unmerging and switching keeps the model what it must be.",
    "model write trainable merge unmerge disable",
    "merge",
    "unmerge",
    "enable",
)
_walk(
    "STATE-002",
    "Any sequence of adding, setting, deleting and switching adapters keeps the model what it must be.",
    "model write trainable adapters disable",
    "add",
    "set",
    "delete",
    "enable",
)
_walk(
    "STATE-003",
    "The same with merging.",
    "model write trainable adapters merge unmerge disable",
    "add",
    "set",
    "delete",
    "enable",
    "merge",
    "unmerge",
)
_walk(
    "STATE-004",
    "The same with weighted combination.",
    "model write trainable adapters weighted merge unmerge",
    "add",
    "set",
    "delete",
    "combine",
    "merge",
    "unmerge",
)
_walk(
    "STATE-005",
    "The same with saving and loading again in between.",
    "model write trainable adapters files merge unmerge",
    "reload",
    "merge",
    "unmerge",
    "enable",
)
