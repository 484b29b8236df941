"""add_weighted_adapter: a new adapter from others."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import Array, Implementation, LayerState, Model, ModelSpec
from ..generate import ALPHAS
from ..registry import requirement
from .operations import fill, gives, holds, small

DOC = "PEFT's documentation of add_weighted_adapter (U9)"
WEIGHTS = st.sampled_from((1.0, 0.5, 2.0, 0.25))


@st.composite
def combined(
    draw: Any, implementation: Implementation, same_rank: bool = False, rslora: bool = False, **config: Any
) -> tuple[ModelSpec, dict[str, Any], list[float]]:
    """A model, the configuration of a second adapter on the same modules, and two weights."""
    spec = draw(small(implementation, r=2, **config))
    roots = st.booleans() if rslora else st.just(False)
    if "rslora" in implementation.claims:
        spec = spec.but(use_rslora=draw(roots))
    second = {
        **spec.config,
        "r": 2 if same_rank else draw(st.sampled_from((1, 2, 3))),
        "lora_alpha": draw(st.sampled_from(ALPHAS)),
    }
    if "rslora" in implementation.claims:
        second["use_rslora"] = draw(roots)
    return spec, second, [draw(WEIGHTS), draw(WEIGHTS)]


def parents(implementation: Implementation, case: Any) -> tuple[Model, ModelSpec, list[float], list[Any]]:
    spec, second, weights = case
    model = implementation.model(spec)
    first = fill(model, spec)
    model.add("second", second)
    return model, spec, weights, [first, fill(model, spec, "second", salt=1)]


def update(state: LayerState) -> Array:
    return oracle.delta(state.A, state.B, state.scaling)


def size(state: LayerState) -> Array:
    return oracle.delta_bound(state.A, state.B, state.scaling)


@requirement(
    "WEIGHT-001",
    "cat: the update is the sum of the weighted updates, of any ranks.",
    DOC,
    "model adapters weighted write",
    combined,
)
def weight_001(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, weights, states = parents(implementation, case)
    model.combine(["default", "second"], weights, "new", "cat")
    for name in states[0]:
        want, bound = (sum(abs(w) * f(s[name]) for w, s in zip(weights, states, strict=True)) for f in (update, size))
        check.close(update(model.read(name, "new")), want, bound, spec.dtype, f"the combined update of {name}", 16)


@requirement("WEIGHT-002", "cat: the rank is the sum of the ranks.", DOC, "model adapters weighted write", combined)
def weight_002(implementation: Implementation, case: Any, check: Check) -> None:
    model, _spec, weights, states = parents(implementation, case)
    model.combine(["default", "second"], weights, "new", "cat")
    for name, (r, _) in model.adapted("new").items():
        check.equal(r, sum(len(state[name].A) for state in states), f"the rank of {name}")


def _identity(id: str, how: str) -> None:
    @requirement(
        id,
        f"{how}: combining one adapter with the weight 1 gives the same update.",
        DOC + ": the identity",
        "model write adapters weighted",
        combined,
    )
    def body(implementation: Implementation, case: Any, check: Check) -> None:
        model, spec, _, (_, second) = parents(implementation, case)
        model.combine(["second"], [1.0], "new", how)
        for name, state in second.items():
            # svd: rounding is relative to the largest singular value
            bound = np.full(update(state).shape, np.linalg.norm(update(state), 2)) if how == "svd" else size(state)
            got = update(model.read(name, "new"))
            check.close(got, update(state), bound, spec.dtype, f"the combined update of {name}", 32)


_identity("WEIGHT-003", "cat")
_identity("WEIGHT-004", "linear")
_identity("WEIGHT-005", "svd")


@requirement(
    "WEIGHT-006",
    "svd: where the rank suffices the update is the sum of the weighted updates.",
    DOC,
    "model adapters weighted write",
    lambda i: combined(i, same_rank=True),
)
def weight_006(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, weights, states = parents(implementation, case)
    made = []
    for adapter, rows in (("default", slice(0, 1)), ("second", slice(1, 2))):  # rank 1 each, so 2 together
        for name, state in states[0 if adapter == "default" else 1].items():
            A = np.zeros_like(state.A)
            A[rows] = state.A[rows]
            model.write(name, A, state.B, adapter)
        made.append({name: model.read(name, adapter) for name in model.adapted(adapter)})
    model.combine(["default", "second"], weights, "new", "svd")
    for name in made[0]:
        want = sum(w * update(s[name]) for w, s in zip(weights, made, strict=True))
        bound = np.full(
            want.shape, sum(np.linalg.norm(w * size(s[name]), 2) for w, s in zip(weights, made, strict=True))
        )
        check.close(update(model.read(name, "new")), want, bound, spec.dtype, f"the combined update of {name}", 32)


@requirement(
    "WEIGHT-007",
    "linear: A is the sum of sqrt(w s) A_i, B the sum of sqrt(w s) B_i.",
    "lora_ref's decision (U9): PEFT's documentation of add_weighted_adapter calls it a rough approximation",
    "model adapters weighted write decision:linear_combination",
    lambda i: combined(i, same_rank=True),
)
def weight_007(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, weights, states = parents(implementation, case)
    model.combine(["default", "second"], weights, "new", "linear")
    for name in states[0]:
        roots = [(w * s[name].scaling) ** 0.5 for w, s in zip(weights, states, strict=True)]
        A = sum(root * s[name].A for root, s in zip(roots, states, strict=True))
        B = sum(root * s[name].B for root, s in zip(roots, states, strict=True))
        bound = sum(root * abs(s[name].B) for root, s in zip(roots, states, strict=True)) @ sum(
            root * abs(s[name].A) for root, s in zip(roots, states, strict=True)
        )
        got = update(model.read(name, "new"))
        check.close(got, B @ A, bound, spec.dtype, f"the combined update of {name}", 16)


def _negative(id: str, how: str) -> None:
    @requirement(
        id,
        f"{how}: a negative weight takes an adapter's update away.",
        "PEFT's documentation of add_weighted_adapter: negative weights (U9)",
        "model write adapters weighted",
        lambda i: st.tuples(combined(i, same_rank=True), st.sampled_from((-1.0, -0.5))),
    )
    def body(implementation: Implementation, case: Any, check: Check) -> None:
        model, spec, _, (_, second) = parents(implementation, case[0])
        model.combine(["second"], [case[1]], "new", how)
        for name, state in second.items():
            bound = np.full(update(state).shape, np.linalg.norm(size(state), 2))
            got = update(model.read(name, "new"))
            check.close(got, case[1] * update(state), bound, spec.dtype, f"the combined update of {name}", 32)


_negative("WEIGHT-008", "cat")
_negative("WEIGHT-009", "linear")
_negative("WEIGHT-010", "svd")


@requirement(
    "WEIGHT-011",
    "Combining changes neither its parents nor the base, nor what is active.",
    DOC,
    "model adapters weighted write",
    combined,
)
def weight_011(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, weights, states = parents(implementation, case)
    model.combine(["default", "second"], weights, "new", "cat")
    check.equal(model.active(), ["default"], "the active adapters")
    gives(check, model, spec, [states[0]], "the output")
    holds(check, model.base(), spec, [], "the base model", exact=True)
    for adapter, state in zip(("default", "second"), states, strict=True):
        for name in state:
            again = model.read(name, adapter)
            for letter in ("A", "B", "scaling"):
                check.equal(getattr(again, letter), getattr(state[name], letter), f"{letter} of {adapter} in {name}")


@requirement(
    "WEIGHT-012", "The combined adapter can be set, and acts.", DOC, "model adapters weighted trainable write", combined
)
def weight_012(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, weights, _ = parents(implementation, case)
    model.combine(["default", "second"], weights, "new", "cat")
    new = {name: model.read(name, "new") for name in model.adapted("new")}
    model.set(["new"])
    gives(check, model, spec, [new], "the output of the combined adapter")
    want = sorted(f"{name}.{letter}:new" for name in new for letter in "AB")
    check.equal(sorted(model.trainable()), want, "what trains")


@requirement(
    "WEIGHT-013",
    "As many weights as adapters are needed: others are refused.",
    DOC,
    "model adapters weighted errors write",
    combined,
)
def weight_013(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, states = parents(implementation, case)
    check.refused(lambda: model.combine(["default", "second"], [1.0], "new", "cat"), "two adapters with one weight")
    check.equal(model.active(), ["default"], "the active adapters")
    gives(check, model, spec, [states[0]], "the output after the refusal")


@requirement(
    "WEIGHT-014",
    "linear needs equal ranks: others are refused.",
    DOC,
    "model adapters weighted errors write",
    lambda i: combined(i, same_rank=True),
)
def weight_014(implementation: Implementation, case: Any, check: Check) -> None:
    model, _spec, weights, _ = parents(implementation, (case[0], {**case[1], "r": 3}, case[2]))
    check.refused(lambda: model.combine(["default", "second"], weights, "new", "linear"), "linear with ranks 2 and 3")


@requirement(
    "WEIGHT-015",
    "An adapter that does not exist, or an unknown combination, is refused.",
    DOC,
    "model adapters weighted errors write",
    combined,
)
def weight_015(implementation: Implementation, case: Any, check: Check) -> None:
    model, _spec, weights, _ = parents(implementation, case)
    check.refused(lambda: model.combine(["default", "nobody"], weights, "new", "cat"), "an adapter that does not exist")
    check.refused(lambda: model.combine(["default", "second"], weights, "new", "nothing"), "an unknown combination")


def _parents(id: str, what: str, patterns: dict[str, Any]) -> None:
    @requirement(
        id,
        f"Parents with {what}: cat, linear and svd of one of them with the weight 1 change nothing.",
        DOC + ": the identity, per module",
        "model write adapters weighted patterns",
        lambda i: combined(i, **patterns),
    )
    def body(implementation: Implementation, case: Any, check: Check) -> None:
        model, spec, _, (first, _) = parents(implementation, case)
        for how in ("cat", "linear", "svd"):
            model.combine(["default"], [1.0], how, how)
            for name, state in first.items():
                bound = np.full(update(state).shape, np.linalg.norm(size(state), 2))
                got = update(model.read(name, how))
                check.close(got, update(state), bound, spec.dtype, f"{how}: the combined update of {name}", 32)


_parents("WEIGHT-016", "alpha_pattern", {"alpha_pattern": {"up": 5}})
_parents("WEIGHT-017", "rank_pattern", {"rank_pattern": {"up": 3, "head": 1}})


@requirement(
    "WEIGHT-018",
    "Parents with use_rslora, or one with and one without: the update of cat is the sum of the weighted updates.",
    DOC + ": s of each parent counts, whatever its formula",
    "model adapters weighted rslora write",
    lambda i: combined(i, rslora=True),
)
def weight_018(implementation: Implementation, case: Any, check: Check) -> None:
    model, _, weights, states = parents(implementation, case)
    model.combine(["default", "second"], weights, "new", "cat")
    for name in states[0]:
        want, bound = (sum(abs(w) * f(s[name]) for w, s in zip(weights, states, strict=True)) for f in (update, size))
        got = update(model.read(name, "new"))
        check.close(got, want, bound, case[0].dtype, f"the combined update of {name}", 16)
