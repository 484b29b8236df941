"""Two adapters with any starts in one model: switching, summing, switching off, batches, deleting, combining, merging.

What an adapter does is s B A; where its start changes W, s B A less what the start took out of W. Both are kept as
pairs of factors, so that an adapter is a list of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import Array, Implementation, LayerState, Model, ModelSpec
from ..generate import ALPHAS, claimed, model_inputs, models, reals
from ..registry import requirement
from .inits_weight import separated
from .operations import output

STAYS = ("True", "False", "gaussian", "orthogonal", "mica")  # starts that leave W alone
MOVES = ("pissa", "pissa_niter", "olora", "loftq")  # starts that change it
DOC = "PEFT's documentation of set_adapter and of init_lora_weights"
OURS = "lora_ref's decision: a start that changes W acts with its own adapter only"
OWN = "decision:own_residual"
FACTOR = 16.0  # roundings of a module: 8 of its formula, and 8 of what the start took out of W

Acting = list[dict[str, LayerState]]


@st.composite
def started(draw: Any, implementation: Implementation, inits: Sequence[str]) -> dict[str, Any]:
    """The options of an adapter with one of these starts."""
    init = draw(st.sampled_from([name[5:] for name in claimed(implementation, [f"init:{name}" for name in inits])]))
    options: dict[str, Any] = {
        "r": 2 if init == "orthogonal" else draw(st.sampled_from((1, 2, 3))),
        "lora_alpha": draw(st.sampled_from(ALPHAS)),
        "target_modules": draw(st.sampled_from((["proj", "up", "head"], ["proj", "down"]))),
        "init_lora_weights": {"True": True, "False": False}.get(init, init),
    }
    if init == "pissa_niter":
        options["init_lora_weights"] = f"pissa_niter_{draw(st.sampled_from((0, 1, 4, 16)))}"
    if init == "loftq":
        options["loftq_config"] = {"loftq_bits": draw(st.sampled_from((2, 4))), "loftq_iter": draw(st.integers(1, 2))}
    if "rslora" in implementation.claims:
        options["use_rslora"] = draw(st.booleans())
    return options


def without_roots(implementation: Implementation) -> dict[str, bool]:
    """The options that say that there is no rsLoRA; nothing where the implementation has none."""
    return {"use_rslora": False} if "rslora" in implementation.claims else {}


@st.composite
def chained(draw: Any, implementation: Implementation, inits: Sequence[str], kinds: Sequence[str] = ()) -> ModelSpec:
    """A model of linear layers whose first adapter has one of these starts."""
    kind = st.sampled_from(claimed(implementation, kinds or ("linear", "transposed")))
    shapes = {
        "a.proj": (draw(kind), 4, 4),
        "a.up": (draw(kind), 6, 4),
        "norm": ("norm", 6, 6),
        "a.down": (draw(kind), 4, 6),
        "head": (draw(kind), 3, 4),
    }
    spec = draw(models(implementation, shapes, **draw(started(implementation, inits))))
    rng = np.random.default_rng(spec.seed)
    for module in spec.modules.values():
        if module.kind != "norm":
            module.W[...] = separated(rng, *module.W.shape)
    return spec


def stay(implementation: Implementation) -> Any:
    """A model, the options of a second adapter, and which of the two are trained; no start changes W."""
    return st.tuples(
        chained(implementation, STAYS), started(implementation, STAYS), st.tuples(st.booleans(), st.booleans())
    )


def move(implementation: Implementation) -> Any:
    """The same; at least one of the two starts changes W."""
    every = (*STAYS, *MOVES)
    pairs = [(MOVES, MOVES), (MOVES, every), (every, MOVES)]
    return st.sampled_from(pairs).flatmap(
        lambda pair: st.tuples(
            chained(implementation, pair[0]),
            started(implementation, pair[1]),
            st.tuples(st.booleans(), st.booleans()),
        )
    )


def acting(model: Model, spec: ModelSpec, adapter: str, init: Any, trained: bool, salt: int = 0) -> Acting:
    """The adapter's s B A and what its start took out of W; `trained`: with other factors than it started with."""
    rng = np.random.default_rng([spec.seed, salt, 7])
    now, taken = {}, {}
    for name in model.adapted(adapter):
        first = model.read(name, adapter)
        if init == "loftq":  # only the weight itself says which Q was taken
            before = model.active()
            model.set([adapter])
            moved = spec.modules[name].W - model.read(name, adapter).W
            model.set(before)
            taken[name] = first._replace(A=moved, B=np.eye(len(moved)), scaling=-1.0)
        elif str(init).startswith(("pissa", "olora")):
            taken[name] = first._replace(scaling=-first.scaling)
        if trained:
            A, B = reals(rng, first.A.shape), reals(rng, first.B.shape) / 2
            model.write(name, A, B, adapter)
        now[name] = model.read(name, adapter)
    return [now, taken]


def both(implementation: Implementation, case: Any) -> tuple[Model, ModelSpec, Acting, Acting]:
    """The model with two adapters, "default" and "other"; the first is active."""
    spec, second, (one, two) = case
    model = implementation.model(spec)
    first = acting(model, spec, "default", spec.config["init_lora_weights"], one)
    model.add("other", second)
    return model, spec, first, acting(model, spec, "other", second["init_lora_weights"], two, salt=1)


def runs(check: Check, got: Array, spec: ModelSpec, states: Acting, x: Array, what: str) -> None:
    """The output for x is that of the base with these updates."""
    y, size = output(spec, states, x)
    check.close(got, y, size, spec.dtype, what, FACTOR * len(spec.modules))


def alone(implementation: Implementation, spec: ModelSpec, x: Array) -> Array:
    """The output of the base model: of an adapter that is switched off and never changed W."""
    model = implementation.model(spec.but(init_lora_weights=True, loftq_config={}))
    model.enable(False)
    return model.forward(x)


def switched(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, first, second = both(implementation, case)
    x = model_inputs(spec)
    runs(check, model.forward(x), spec, first, x, "the output with the first adapter")
    model.set(["other"])
    runs(check, model.forward(x), spec, second, x, "the output with the second adapter")


@requirement(
    "MEET-001",
    "Whatever their starts, the adapter that is set acts alone.",
    DOC,
    "model write adapters init:True",
    stay,
)
def meet_001(implementation: Implementation, case: Any, check: Check) -> None:
    switched(implementation, case, check)


@requirement(
    "MEET-002",
    "Setting an adapter gives W and its own update, though a start took a part out of W.",
    OURS,
    f"model write adapters init:pissa {OWN}",
    move,
)
def meet_002(implementation: Implementation, case: Any, check: Check) -> None:
    switched(implementation, case, check)


def summed(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, first, second = both(implementation, case)
    model.set(["default", "other"])
    x = model_inputs(spec)
    runs(check, model.forward(x), spec, first + second, x, "the output with both adapters")


@requirement(
    "MEET-003",
    "Whatever their starts, the updates of two active adapters add up.",
    DOC,
    "model write adapters summed init:True",
    stay,
)
def meet_003(implementation: Implementation, case: Any, check: Check) -> None:
    summed(implementation, case, check)


@requirement(
    "MEET-004",
    "What two active adapters do adds up, though their starts took parts out of W.",
    OURS,
    f"model write adapters summed init:pissa {OWN}",
    move,
)
def meet_004(implementation: Implementation, case: Any, check: Check) -> None:
    summed(implementation, case, check)


def off(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, second = both(implementation, case)
    x = model_inputs(spec)
    want = alone(implementation, spec, x)
    for names in (["default"], ["other"]):
        model.set(names)
        model.enable(False)
        check.equal(model.forward(x), want, f"the output with {names} switched off")
        model.enable(True)
    runs(check, model.forward(x), spec, second, x, "the output, on again")


@requirement(
    "MEET-005",
    "Whatever the start, an adapter that is switched off leaves the base model bit for bit.",
    'PEFT\'s documentation of disable_adapter: "Use this to run inference on the base model" (U2)',
    "model write adapters disable init:True",
    stay,
)
def meet_005(implementation: Implementation, case: Any, check: Check) -> None:
    off(implementation, case, check)


@requirement(
    "MEET-006",
    "Beside a second adapter, a start that changes W leaves the base bit for bit when it is switched off.",
    OURS,
    f"model write adapters disable init:True init:pissa {OWN}",
    move,
)
def meet_006(implementation: Implementation, case: Any, check: Check) -> None:
    off(implementation, case, check)


def mixed(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, first, second = both(implementation, case)
    choice: dict[str, Acting] = {"default": first, "__base__": [], "other": second}
    names = ["other", "__base__", "default", "other"]
    x = model_inputs(spec, batch=4)
    got = model.forward(x, adapter_names=names)
    for row, name in enumerate(names):
        at = slice(row, row + 1)
        runs(check, got[at], spec, choice[name], x[at], f"the row of {name}")


@requirement(
    "MEET-007",
    "In a mixed batch each row has its adapter's update alone, whatever the starts.",
    "PEFT's documentation: inference with different adapters in the same batch (U8)",
    "model write adapters batch init:True",
    stay,
)
def meet_007(implementation: Implementation, case: Any, check: Check) -> None:
    mixed(implementation, case, check)


@requirement(
    "MEET-008",
    "In a mixed batch each row has its own adapter's part taken out of W, and __base__ has none.",
    OURS,
    f"model write adapters batch init:pissa {OWN}",
    move,
)
def meet_008(implementation: Implementation, case: Any, check: Check) -> None:
    mixed(implementation, case, check)


def deleted(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, second = both(implementation, case)
    x = model_inputs(spec)
    model.set(["other"])
    model.delete("default")
    runs(check, model.forward(x), spec, second, x, "the output after deleting the first adapter")
    model.add("default", spec.config)
    again = acting(model, spec, "default", spec.config["init_lora_weights"], True, salt=2)
    model.set(["default"])
    model.delete("other")
    runs(check, model.forward(x), spec, again, x, "the output of an adapter that was added again")


@requirement(
    "MEET-009",
    "Whatever its start, a deleted adapter is gone, and its name is free.",
    "PEFT's documentation of delete_adapter (U7)",
    "model write adapters delete init:True",
    stay,
)
def meet_009(implementation: Implementation, case: Any, check: Check) -> None:
    deleted(implementation, case, check)


@requirement(
    "MEET-010",
    "Deleting an adapter puts back what its start took out of W.",
    OURS,
    f"model write adapters delete init:pissa {OWN}",
    move,
)
def meet_010(implementation: Implementation, case: Any, check: Check) -> None:
    deleted(implementation, case, check)


@st.composite
def exact(draw: Any, implementation: Implementation) -> Any:
    """A model with any start, and a second adapter whose start is computed from W alone, without random numbers."""
    first = (*STAYS, *MOVES) if OWN in implementation.claims else STAYS
    second = ("pissa", "olora", "loftq", "mica") if OWN in implementation.claims else ("mica",)
    return draw(chained(implementation, first)), draw(started(implementation, second))


def spans(state: LayerState, bare: bool) -> Array:
    """s B A, or the projector on B where A is zero."""
    return state.B @ state.B.T if bare else oracle.delta(state.A, state.B, state.scaling)


@requirement(
    "MEET-011",
    "The start of a second adapter is computed from W, and not from what another start left of it.",
    OURS,
    f"model adapters init:mica {OWN}",
    exact,
)
def meet_011(implementation: Implementation, case: Any, check: Check) -> None:
    spec, second = case
    model, single = implementation.model(spec), implementation.model(spec.but(**{"loftq_config": {}, **second}))
    model.add("other", second)
    bare = second["init_lora_weights"] == "mica"
    for name in single.adapted():
        got, want = (spans(state, bare) for state in (model.read(name, "other"), single.read(name)))
        # W has the singular values 8, 4, 2, ... and r is at most 3: the gap below the r-th is at least 1/2
        check.close(got, want, 128.0, spec.dtype, f"the start of {name}", 32.0)
