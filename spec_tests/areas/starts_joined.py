"""Two adapters with any starts, brought together: merged, unloaded, combined, trained and saved."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, ModelSpec
from ..generate import model_inputs
from ..registry import requirement
from .operations import holds, output
from .starts_meet import (
    FACTOR,
    OURS,
    OWN,
    STAYS,
    Acting,
    acting,
    both,
    chained,
    move,
    runs,
    started,
    stay,
    without_roots,
)

MERGED = "LoRA, arXiv 2106.09685, section 4.1: a merged model is a plain one (U1)"
NO_PATTERNS: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
PLAIN = (
    "PEFT's documentation of path_initial_model_for_weight_conversion: the difference before and after training "
    '"can be represented as the parameters of a standard LoRA adapter" (V1, V2)'
)


def merged(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, first, second = both(implementation, case)
    x = model_inputs(spec)
    model.set(["other"])
    model.merge()
    runs(check, model.forward(x), spec, second, x, "the output with the second adapter merged")
    model.unmerge()
    model.set(["default"])
    # what merging and unmerging rounded may stay in W
    y, _ = output(spec, first, x)
    size = output(spec, first + second, x)[1]
    check.close(model.forward(x), y, size, spec.dtype, "the output afterwards", 2 * FACTOR * len(spec.modules))


@requirement(
    "MEETJOIN-001",
    "Whatever their starts, merging and unmerging the second adapter leaves the first as it was.",
    MERGED,
    "model write adapters merge unmerge init:True",
    stay,
)
def meetjoin_001(implementation: Implementation, case: Any, check: Check) -> None:
    merged(implementation, case, check)


@requirement(
    "MEETJOIN-002",
    "Merging an adapter merges what its start took out of W, and nothing of another's.",
    OURS,
    f"model write adapters merge unmerge init:pissa {OWN}",
    move,
)
def meetjoin_002(implementation: Implementation, case: Any, check: Check) -> None:
    merged(implementation, case, check)


def unloaded(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, _, second = both(implementation, case)
    model.set(["other"])
    holds(check, model.unload(merge=True), spec, second, "the merged model", factor=FACTOR)
    model, spec, *_ = both(implementation, case)
    holds(check, model.unload(merge=False), spec, [], "the plain model", exact=True)


@requirement(
    "MEETJOIN-003",
    "Whatever their starts, unloading gives W, or W and the update of the active adapter.",
    "PEFT's documentation of unload and merge_and_unload (U5, U6)",
    "model write adapters merge unload init:True",
    stay,
)
def meetjoin_003(implementation: Implementation, case: Any, check: Check) -> None:
    unloaded(implementation, case, check)


@requirement(
    "MEETJOIN-004",
    "Unloading puts back what starts took out of W, bit for bit, or merges it with its own adapter.",
    OURS,
    f"model write adapters merge unload init:pissa {OWN}",
    move,
)
def meetjoin_004(implementation: Implementation, case: Any, check: Check) -> None:
    unloaded(implementation, case, check)


def scaled(weight: float, states: Acting) -> Acting:
    """Each update times a weight."""
    return [{n: s._replace(scaling=weight * s.scaling) for n, s in one.items()} for one in states]


def combined(implementation: Implementation, case: Any, check: Check) -> None:
    (spec, second_config, trained), how = case
    off = without_roots(implementation)  # WEIGHT-018 combines rsLoRA
    plainly = spec.but(**off), second_config | off, trained
    model, spec, first, second = both(implementation, plainly)
    parents = ["default", "other"] if how == "cat" else ["other"]
    want = scaled(2.0, second) + (scaled(0.5, first) if how == "cat" else [])
    try:
        model.combine(parents, [0.5, 2.0][-len(parents) :], "new", how)
    except ValueError:
        if "loftq" in (spec.config["init_lora_weights"], second_config["init_lora_weights"]):
            return  # what it took out of W is not a product of factors: it may be refused
        raise
    model.set(["new"])
    # svd: a product of factors is decomposed, and what is small beside its largest number is rounded as that is
    x = model_inputs(spec)
    y, size = output(spec, want, x)
    factor = FACTOR * len(spec.modules)
    check.close(model.forward(x), y, size.max() if how == "svd" else size, spec.dtype, f"the output of {how}", factor)


HOW = st.sampled_from(("cat", "cat", "svd", "linear"))
BOTH = st.tuples(st.booleans(), st.booleans())


RESTRICTED = ("orthogonal", "mica")  # they start not with every rank
FREE = ("True", "False", "gaussian")


def free(implementation: Implementation) -> Any:
    """A model and a second adapter, whose starts take every rank."""
    return st.tuples(st.tuples(chained(implementation, FREE), started(implementation, FREE), BOTH), HOW)


def restricted(implementation: Implementation) -> Any:
    """The same; at least one of the two starts does not take every rank."""
    pairs = [(RESTRICTED, STAYS), (STAYS, RESTRICTED)]
    drawn = st.sampled_from(pairs).flatmap(
        lambda pair: st.tuples(chained(implementation, pair[0]), started(implementation, pair[1]), BOTH)
    )
    return st.tuples(drawn, HOW)


@requirement(
    "MEETJOIN-005",
    "Of random starts, a combination does what its parents do, each times its weight.",
    "PEFT's documentation of add_weighted_adapter (U9)",
    "model write adapters weighted init:True",
    free,
)
def meetjoin_005(implementation: Implementation, case: Any, check: Check) -> None:
    combined(implementation, case, check)


@requirement(
    "MEETJOIN-010",
    "Adapters that started orthogonal or mica are combined with others, whatever the rank of the result.",
    "PEFT's documentation of add_weighted_adapter: the rank of cat is the sum of all ranks (U9)",
    "model write adapters weighted init:True init:orthogonal init:mica",
    restricted,
)
def meetjoin_010(implementation: Implementation, case: Any, check: Check) -> None:
    combined(implementation, case, check)


@requirement(
    "MEETJOIN-006",
    "A combination takes out of W what the starts of its parents did, each times its weight.",
    OURS,
    f"model write adapters weighted init:pissa {OWN}",
    lambda i: st.tuples(move(i), HOW),
)
def meetjoin_006(implementation: Implementation, case: Any, check: Check) -> None:
    combined(implementation, case, check)


@requirement(
    "MEETJOIN-007",
    "Both factors of the active adapter train, but B of mica never does.",
    'PEFT\'s documentation of "mica": B is frozen, only A is trained (M1)',
    "model write adapters trainable init:True",
    stay,
)
def meetjoin_007(implementation: Implementation, case: Any, check: Check) -> None:
    model, spec, *_ = both(implementation, case)
    inits = {"default": spec.config["init_lora_weights"], "other": case[1]["init_lora_weights"]}
    for name in ("default", "other", "default"):
        model.set([name])
        letters = "A" if inits[name] == "mica" else "AB"
        want = sorted(f"{module}.{letter}:{name}" for module in model.adapted(name) for letter in letters)
        check.equal(sorted(model.trainable()), want, f"what trains with {name} active")


@requirement(
    "MEETJOIN-008",
    "Whatever its start, an adapter that leaves W alone is saved, and loaded beside another.",
    "PEFT's documentation of load_adapter (V2)",
    "model write adapters files init:True",
    stay,
    slow=2,
)
def meetjoin_008(implementation: Implementation, case: Any, check: Check) -> None:
    spec, second, _ = case
    model = implementation.model(spec)
    first = acting(model, spec, "default", spec.config["init_lora_weights"], True)
    there = implementation.model(spec.but(**second))
    own = acting(there, spec, "default", second["init_lora_weights"], True, salt=1)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        there.load(Path(place), "loaded")
    x = model_inputs(spec)
    runs(check, there.forward(x), spec, own, x, "the output of the adapter that was there")
    there.set(["loaded"])
    runs(check, there.forward(x), spec, first, x, "the output of the loaded adapter")


@st.composite
def converting(draw: Any, implementation: Implementation, patterns: bool = False) -> tuple[ModelSpec, dict[str, Any]]:
    """A model of plain linear layers with a start that subtracts a product from W, and the options of another start."""
    inits = [name for name in ("pissa", "pissa_niter", "olora") if f"init:{name}" in implementation.claims]
    spec = draw(chained(implementation, inits, ("linear",)))
    if patterns:  # PEFT's documentation leaves out rsLoRA here
        spec = spec.but(rank_pattern={"proj": 3}, alpha_pattern={"up": 3, "down": 5}, **without_roots(implementation))
    return spec, draw(started(implementation, ("True", "gaussian")))


def converted(implementation: Implementation, case: Any, check: Check) -> None:
    spec, second = case
    there = implementation.model(spec.but(**({**NO_PATTERNS, **second} if "rank_pattern" in spec.config else second)))
    own = acting(there, spec, "default", second["init_lora_weights"], True, salt=1)
    model = implementation.model(spec)
    with tempfile.TemporaryDirectory() as place:
        model.save_start(Path(place, "start"))
        states = acting(model, spec, "default", spec.config["init_lora_weights"], True)
        model.save_converted(Path(place, "plain"), Path(place, "start"))
        there.load(Path(place, "plain"), "plain")
    x = model_inputs(spec)
    there.set(["plain"])
    runs(check, there.forward(x), spec, states, x, "the output of the converted adapter")
    there.set(["default"])
    runs(check, there.forward(x), spec, own, x, "the output of the adapter beside it")
    runs(check, model.forward(x), spec, states, x, "the output of the adapter that was saved")


@requirement(
    "MEETJOIN-009",
    "A start that changes W is saved as plain LoRA, which does the same on the original base.",
    PLAIN,
    "model linear write adapters files converts init:pissa init:True",
    converting,
    slow=2,
)
def meetjoin_009(implementation: Implementation, case: Any, check: Check) -> None:
    converted(implementation, case, check)


@requirement(
    "MEETJOIN-011",
    "With rank_pattern and alpha_pattern, too, a start is saved as plain LoRA that fits the original base.",
    PLAIN,
    "model linear write adapters files converts patterns init:pissa init:True",
    lambda i: converting(i, patterns=True),
    slow=2,
)
def meetjoin_011(implementation: Implementation, case: Any, check: Check) -> None:
    converted(implementation, case, check)


@requirement(
    "MEETJOIN-012",
    "Whatever the starts, deleting an inactive adapter leaves two active others as they were.",
    "PEFT's documentation of delete_adapter, and of using several adapters at the same time (U7)",
    "model write adapters summed delete init:True",
    lambda i: st.tuples(stay(i), started(i, STAYS)),
)
def meetjoin_012(implementation: Implementation, case: Any, check: Check) -> None:
    pair, third = case
    model, spec, _, second = both(implementation, pair)
    model.add("third", third)
    states = second + acting(model, spec, "third", third["init_lora_weights"], True, salt=2)
    model.set(["other", "third"])
    model.delete("default")
    x = model_inputs(spec)
    runs(check, model.forward(x), spec, states, x, "the output of the two active adapters")
