"""What mistakes made by hand in lora_ref showed that no requirement looked at: deletions, two names, directions."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, LayerSpec, ModelSpec
from ..registry import requirement
from .adapters_named import both, pairs
from .inits_data import FACTOR, LORA_GA, lora_ga, start
from .merged_models import near, restored
from .operations import fill, gives
from .structures import SAME, squares

TAKES_OVER = "PEFT, LoraLayer.delete_adapter: it also sets a new active adapter if the deleted one was active"
DELETE = "PEFT, PeftModel.delete_adapter: it deletes an existing adapter"
SHARES = {"ArB2r": (0, 1), "A2rBr": (1, 0)}  # which r of the first 2 r directions A and B get


@requirement(
    "OVERLOOK-001",
    "After the active adapter is deleted, the one that is left is active, and acts alone.",
    f"{TAKES_OVER} (U7)",
    "model write adapters delete",
    pairs,
)
def overlook_001(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, _, second = both(implementation, case)
    model.delete("default")
    check.equal(model.active(), [name], "the active adapters")
    gives(check, model, spec, [second], "the output after the deletion")


@requirement(
    "OVERLOOK-002",
    "Deleting one of two merged adapters is refused, or takes its update out of the weights.",
    f"{DELETE}; {SAME} (U7)",
    "model write adapters summed delete merge unmerge",
    pairs,
)
def overlook_002(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, name, first, second = both(implementation, case)
    model.set(["default", name])
    model.merge()
    deleted = check.accepted(lambda: model.delete(name))
    left = [first] if deleted else [first, second]
    near(check, model, spec, left, [first, second], "the output after the deletion")
    model.unmerge()
    restored(check, model, spec, [first, second], "W after unmerging")


def held(implementation: Implementation) -> Any:
    """A module with two names, of which both are targeted."""
    specs = squares(("a.shared", "a.other", "b.again"), {"b.again": "a.shared"})
    return st.builds(lambda spec, last: spec.but(target_modules=["shared", "again", *last]), specs, LAST)


LAST = st.sampled_from(([], ["other"]))


@requirement(
    "OVERLOOK-003",
    "A module whose two names are both targeted is refused, or adapted once: its update acts once, merged and not.",
    f"torch.nn.Module.named_modules: a module that is there twice is one module; {SAME}",
    "model linear model:held_twice merge",
    held,
)
def overlook_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    from .structures import gives as acts

    model = check.tried(lambda: implementation.model(spec))
    if model is None:
        return
    states = fill(model, spec)
    acts(check, model, spec, [states], "the output")
    model.merge()
    acts(check, model, spec, [states], "the merged output")


def shared_out(implementation: Implementation) -> Any:
    def build(spec: LayerSpec, direction: str) -> LayerSpec:
        return spec.but(init_options={**spec.init_options, "direction": direction})

    return st.builds(build, lora_ga(implementation), st.sampled_from(sorted(SHARES)))


@requirement(
    "OVERLOOK-004",
    "lora_ga: A and B get the r directions of the gradient each that the option `direction` says.",
    'PEFT, LoraGAConfig.direction: "A2rBr": A takes indices [r:2r], B takes indices [:r]; "ArB2r": the reverse (R2)',
    "init:lora_ga lora_ga:direction",
    shared_out,
    slow=2,
)
def overlook_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state, r = start(implementation, spec), spec.r
    U, S, Vt = np.linalg.svd(spec.init_options["dy"].T, full_matrices=False)
    gap = S[r - 1] - S[r] if 2 * r == len(S) else min(S[r - 1] - S[r], S[2 * r - 1] - S[2 * r])
    which = SHARES[spec.init_options["direction"]]
    for name, rows, directions, at in zip("AB", (state.A, state.B.T), (Vt, U.T), which, strict=True):
        unit = rows / np.linalg.norm(rows, axis=1)[:, None]
        mine = directions[at * r : (at + 1) * r]
        what = f"the part of {name} outside of its singular vectors"
        check.close(unit - unit @ mine.T @ mine, np.zeros_like(unit), S[0] / gap, spec.dtype, what, FACTOR)
