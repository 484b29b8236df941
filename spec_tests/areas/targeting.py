"""Which modules an adapter is put on."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import generate, matching
from ..check import Check
from ..contract import Implementation, ModelSpec
from ..generate import BLOCKS, chain, model_inputs, models, seeds
from ..registry import requirement

CONFIG = "PEFT's documentation of LoraConfig"
SEGMENTS = ("model", "layers", "h", "experts", "attn", "mlp", "proj", "1", "10", "0", "2")
ENDS = ("q_proj", "xq_proj", "proj", "q", "q1", "fc", "xfc", "10", "1")
MOE = {
    f"model.{place}.{i}.mlp.experts.{j}.{end}": ("linear", 2, 2)
    for place in ("layers", "xlayers")
    for i in (0, 1, 10)
    for j in (0, 1)
    for end in ("w1", "w10")
} | {f"layers.{i}.q_proj": ("linear", 2, 2) for i in (0, 1, 10)}
BLOCK = {k: v for k, v in BLOCKS.items() if v[0] == "linear"}


@st.composite
def trees(draw: Any, implementation: Implementation, most: int = 8) -> dict[str, tuple[str, int, int]]:
    """Modules of names that nearly collide; none lies inside another."""
    paths = st.lists(st.sampled_from(SEGMENTS), max_size=4)
    wanted = draw(st.lists(st.tuples(paths, st.sampled_from(ENDS)), min_size=2, max_size=most))
    kinds = [
        kind for kind in ("linear", "linear", "linear", "transposed", "embedding") if kind in _kinds(implementation)
    ]
    names: list[str] = []
    for path, end in wanted:
        name = ".".join([*path, end])
        if not any(f"{name}.".startswith(f"{old}.") or f"{old}.".startswith(f"{name}.") for old in names):
            names.append(name)
    return {name: (draw(st.sampled_from([*kinds, "norm"])), 2, 2) for name in names}


def _kinds(implementation: Implementation) -> list[str]:
    return generate.claimed(implementation, matching.ADAPTABLE)


def ends(name: str) -> list[str]:
    """The name, and what follows each of its dots."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in range(len(parts))]


@st.composite
def listed(draw: Any, names: Any, most: int = 3) -> list[str]:
    """Items of a list: ends of names, and what only a sloppy comparison takes for one."""
    name = st.sampled_from(sorted(names))
    real = name.flatmap(lambda n: st.sampled_from(ends(n)))
    wrong = real.flatmap(
        lambda e: st.sampled_from([e[1:] or "q", f".*{e}", e.replace("_", "."), e.split(".")[0], f"x{e}", e + "$"])
    )
    return draw(st.lists(st.one_of(real, real, wrong), min_size=1, max_size=most))


@st.composite
def expression(draw: Any, names: Any) -> str:
    """A regular expression: some for whole names, some for ends or starts only, which must not match."""
    name = draw(st.sampled_from(sorted(names)))
    end = draw(st.sampled_from(ends(name)))
    last = re.escape(name.rpartition(".")[2])
    return draw(
        st.sampled_from(
            [
                rf".*\.{re.escape(end)}",
                rf"(.*\.)?{re.escape(end)}",
                f".*{re.escape(end)}",
                end,
                re.escape(name),
                name,
                rf".*\.(1|2)\..*{last}",
                rf".*(0|1)\.{last}",
                f"({last}|fc)",
                rf"[^.]*\.{last}",
            ]
        )
    )


def claimed_targets(implementation: Implementation) -> Any:
    """target_modules in one of the claimed ways."""
    ways = {
        "model": st.just(["up", "down"]),
        "targets:list": listed(BLOCK),
        "targets:regex": expression(BLOCK),
        "all-linear": st.just("all-linear"),
    }
    return st.one_of([way for claim, way in ways.items() if claim in implementation.claims])


def documented(implementation: Implementation, rule: Any, names: Any) -> Any:
    """The rule without what documents leave open, and lora_ref decides; unless the decision is claimed.

    Does the end of a name begin after a dot? Does an expression match the whole name, or its start?
    """
    if isinstance(rule, str) and rule.lower() != "all-linear" and "decision:full_match" not in implementation.claims:
        return f"^(?:{rule})$"
    if isinstance(rule, list) and "decision:whole_segments" not in implementation.claims:
        everything = [*names, *matching.containers(names), *(f"{name}.weight" for name in names)]
        kept = [
            item for item in rule if all(matching.ends_at_dot(name, item) == name.endswith(item) for name in everything)
        ]
        return kept or [max(names, key=len)]
    return rule


def apart(pattern: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The first keys of which no two match one name."""
    kept: dict[str, Any] = {}
    taken: set[str] = set()
    for key, value in pattern.items():
        matched = {name for name in names if matching.looked_up({key: True}, name, False)}
        if not matched & taken:
            kept[key] = value
            taken |= matched
    return kept


@st.composite
def cases(draw: Any, implementation: Implementation, shapes: Any = None, **config: Any) -> ModelSpec:
    """A tree and a configuration: option = a function from the names to a strategy, a strategy, or a value."""
    made = draw(trees(implementation)) if shapes is None else shapes
    chosen: dict[str, Any] = {"r": 2, "lora_alpha": 4.0}
    for option, value in config.items():
        value = value(made) if callable(value) else value
        chosen[option] = draw(value) if isinstance(value, st.SearchStrategy) else value
    chosen = {option: value for option, value in chosen.items() if value is not ...}
    for option in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        if option in chosen:
            chosen[option] = documented(implementation, chosen[option], made)
    if "decision:pattern_order" not in implementation.claims:
        for option in ("rank_pattern", "alpha_pattern"):
            if option in chosen:
                chosen[option] = apart(chosen[option], [*made, *(f"{name}.weight" for name in made)])
    return ModelSpec(chain(np.random.default_rng(0), made), chosen, seed=draw(seeds))


def refused(check: Check, action: Any, what: str) -> None:
    """As `check.refused`; of what is claimed otherwise, NotImplementedError is a refusal too."""
    with contextlib.suppress(NotImplementedError):
        check.refused(action, what)


def kinds_of(spec: ModelSpec) -> Mapping[str, str]:
    return {name: module.kind for name, module in spec.modules.items()}


def compare(check: Check, got: Mapping[str, tuple[int, float]], want: Mapping[str, matching.Target]) -> None:
    """The same modules, r and s."""
    extra, missing = sorted(got.keys() - want.keys()), sorted(want.keys() - got.keys())
    check.that(not extra, f"adapted, but must not be: {extra}")
    check.that(not missing, f"not adapted, but must be: {missing}")
    for name in got.keys() & want.keys():
        r, s = got[name]
        check.that(r == want[name].r, f"{name}: r is {r}, must be {want[name].r}")
        check.close(s, want[name].scaling, abs(want[name].scaling), "float64", f"s of {name}")


def holds(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    """The model is adapted where it must be, and nowhere else; or refused."""
    try:
        want = matching.targets(kinds_of(spec), spec.config)
    except matching.Refusal as why:
        claim = "decision:no_effect" if str(why) == matching.NOTHING else "errors"
        if claim in implementation.claims:
            refused(check, lambda: implementation.model(spec), f"{dict(spec.config)} ({why})")
        return
    compare(check, implementation.model(spec).adapted(), want)


def _rule(id: str, sentence: str, source: str, needs: str, given: Any, slow: int = 2) -> None:
    requirement(id, sentence, source, f"model linear {needs}", given, slow)(holds)


_rule(
    "TARGET-001",
    "A list of targets holds names and ends of names, taken literally.",
    f"{CONFIG}, target_modules (N2)",
    "targets:list",
    lambda i: cases(i, target_modules=listed),
    1,
)
_rule(
    "TARGET-002",
    "A string as target is a regular expression for the name.",
    f"{CONFIG}, target_modules (N3)",
    "targets:regex",
    lambda i: cases(i, target_modules=expression),
    1,
)
_rule(
    "TARGET-003",
    "'all-linear' adapts every linear layer of a plain model and nothing else.",
    f"{CONFIG}, target_modules (N4)",
    "all-linear",
    lambda i: cases(
        i,
        target_modules=st.sampled_from(
            ("all-linear", "ALL-LINEAR", "All-Linear") if "decision:letter_case" in i.claims else ("all-linear",)
        ),
    ),
)
_rule(
    "TARGET-004",
    "A list of exclude_modules follows the rule of a list of targets, and beats every target.",
    f"{CONFIG}, exclude_modules (N6)",
    "targets:list exclude",
    lambda i: cases(i, target_modules=listed, exclude_modules=listed),
    1,
)
_rule(
    "TARGET-005",
    "A string as exclude_modules is a regular expression for the name, and beats every target.",
    f"{CONFIG}, exclude_modules (N6)",
    "targets:list exclude",
    lambda i: cases(i, target_modules=lambda n: listed(n, 6), exclude_modules=expression),
    1,
)
_rule(
    "TARGET-006",
    "Excluding a module beats even its own full name among the targets.",
    f"{CONFIG}, exclude_modules (N6)",
    "targets:list exclude",
    lambda i: cases(i, BLOCK, target_modules=list(BLOCK), exclude_modules=listed),
)
_rule(
    "TARGET-007",
    "Excluding a parent by a list does not exclude what lies in it.",
    "N6",
    "targets:list exclude",
    lambda i: cases(
        i,
        BLOCK,
        target_modules=["q_proj", "up"],
        exclude_modules=st.lists(
            st.sampled_from(("layers", "layers.1", "1", "layers.0.attn", "mlp", "up")), min_size=1
        ),
    ),
)
_rule(
    "TARGET-008",
    "'all-linear' leaves out what exclude_modules names.",
    "N1",
    "exclude all-linear",
    lambda i: cases(
        i, target_modules="all-linear", exclude_modules=st.one_of(listed(ENDS), st.just(r".*\.(1|10)\..*"))
    ),
)


def indices(implementation: Implementation) -> Any:
    """layers_to_transform: a number or a list; an empty list and negative numbers where the decision is claimed."""
    decided = "decision:layer_indices" in implementation.claims
    numbers = st.sampled_from((0, 1, 2, 10, -1) if decided else (0, 1, 2, 10))
    return st.one_of(st.sampled_from((0, 1, 10)), st.lists(numbers, min_size=0 if decided else 1, max_size=2))


LISTS = ("layers", "experts", "xlayers", ["layers"])
SEVERAL = (["xlayers", "layers"], ["experts", "layers"], ["h", "layers"])  # the first that is found counts
_rule(
    "TARGET-010",
    "layers_to_transform adapts the layers with these numbers only: 1 is not 10.",
    f"{CONFIG}, layers_to_transform (N7)",
    "targets:list layers_to_transform",
    lambda i: cases(i, target_modules=listed, layers_to_transform=indices(i)),
    1,
)
_rule(
    "TARGET-011",
    "The first number behind a list of layers is the layer's, not that of an expert within it.",
    "N7",
    "targets:list layers_to_transform",
    lambda i: cases(i, MOE, target_modules=["w1", "q_proj"], layers_to_transform=indices(i)),
)
_rule(
    "TARGET-012",
    "layers_pattern says what the list of layers is called: a whole segment of the name, at the root too.",
    f"{CONFIG}, layers_pattern (N7)",
    "targets:list layers_to_transform",
    lambda i: cases(
        i,
        MOE,
        target_modules=["w1", "q_proj"],
        layers_to_transform=st.one_of(st.sampled_from((0, 1, 10)), st.lists(st.sampled_from((0, 1, 10)), min_size=1)),
        layers_pattern=st.sampled_from((*LISTS, *SEVERAL) if "decision:layer_indices" in i.claims else LISTS),
    ),
)
_rule(
    "TARGET-013",
    "A target given by its full name is adapted in the layers of layers_to_transform only.",
    f"{CONFIG}, layers_to_transform: only the layer indices that are specified (N7)",
    "targets:list layers_to_transform",
    lambda i: cases(
        i,
        MOE,
        target_modules=st.tuples(st.sampled_from(sorted(MOE)), st.just("w1")).map(list),
        layers_to_transform=indices(i),
    ),
)
_rule(
    "TARGET-014",
    "All rules of names together: modules_to_save before exclude_modules before target_modules.",
    "N1, N2, N6, N7",
    "targets:list exclude layers_to_transform modules_to_save",
    lambda i: cases(
        i,
        target_modules=lambda n: listed(n, 6),
        exclude_modules=st.one_of(st.just(...), listed(ENDS)),
        modules_to_save=st.one_of(st.just(...), st.lists(st.sampled_from(("q_proj", "fc", "mlp.q")), min_size=1)),
        layers_to_transform=st.one_of(st.just(...), indices(i)),
    ),
    1,
)
_rule(
    "TARGET-015",
    "An end of a name compares whole segments: '1.q_proj' is in layer 1, not in layer 11 or 10.1.",
    "lora_ref's decision (N2): PEFT's documentation of target_modules says that the name ends with the item",
    "targets:list decision:whole_segments",
    lambda i: cases(
        i,
        {f"layers.{n}.attn.q_proj": ("linear", 2, 2) for n in (0, 1, 10, 11)},
        target_modules=st.lists(
            st.sampled_from(("0.attn.q_proj", "1.attn.q_proj", "s.1.attn.q_proj", "roj")), min_size=1
        ),
    ),
)
_rule(
    "TARGET-016",
    "A bare name as a string finds a module at the root only.",
    "lora_ref's decision (N3): PEFT's documentation of target_modules says that a regex match is performed",
    "targets:regex decision:full_match",
    lambda i: cases(
        i,
        {"q_proj": ("linear", 2, 2), "attn.q_proj": ("linear", 2, 2), "fc": ("linear", 2, 2), "h.v": ("linear", 2, 2)},
        target_modules=st.sampled_from(("q_proj", "fc", "v", "q_pro", "attn.q_proj", "proj", "q_proj|v", "q")),
    ),
)
_rule(
    "TARGET-040",
    "exclude_modules and layers_to_transform restrict target_parameters, too.",
    f"{CONFIG}, exclude_modules: the modules that are not adapted; target_parameters: as target_modules (N1, N7)",
    "target_parameters exclude layers_to_transform",
    lambda i: cases(
        i,
        BLOCK,
        target_parameters=st.just([f"{name}.weight" for name in BLOCK]),
        exclude_modules=st.one_of(st.just(...), listed(BLOCK)),
        layers_to_transform=(
            st.one_of(st.just(...), indices(i)) if "decision:layer_indices" in i.claims else st.just(...)
        ),
    ),
)
_rule(
    "TARGET-017",
    "target_parameters names parameters by '<module>.<parameter>' or an end of that which begins after a dot.",
    f"{CONFIG}, target_parameters (N11)",
    "target_parameters",
    lambda i: cases(
        i,
        BLOCK,
        target_parameters=lambda n: listed([f"{name}.weight" for name in n]).map(
            lambda items: [item for item in items if item != "weight"] or ["q_proj.weight"]
        ),
    ),
)


@requirement(
    "TARGET-020",
    "The order of a list of targets, and items given twice, do not matter.",
    "N2",
    "model linear targets:list",
    lambda i: cases(i, BLOCK, target_modules=listed),
    slow=2,
)
def target_020(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    items = spec.config["target_modules"]
    spec = spec.but(target_modules=["head", *items])
    try:
        matching.targets(kinds_of(spec), spec.config)
    except matching.Refusal:  # "layers" names a container
        return
    once = implementation.model(spec).adapted()
    again = implementation.model(spec.but(target_modules=[*items[::-1], *items, "head"])).adapted()
    check.that(once == again, f"{sorted(once)} in one order, {sorted(again)} in the other")


@requirement(
    "TARGET-021",
    "A further adapter is put where its own configuration says, as if the first were not there.",
    "N2, N3, N4, U7",
    "model linear adapters",
    lambda i: st.tuples(cases(i, BLOCK, target_modules=["up", "head"]), claimed_targets(i)),
    slow=2,
)
def target_021(implementation: Implementation, case: tuple[ModelSpec, Any], check: Check) -> None:
    spec, second = case
    model = implementation.model(spec)
    config = {"r": 3, "lora_alpha": 6.0, "target_modules": second}
    try:
        want = matching.targets(kinds_of(spec), config)
    except matching.Refusal:
        return
    model.add("second", config)
    compare(check, model.adapted("second"), want)
    compare(check, model.adapted(), matching.targets(kinds_of(spec), spec.config))


@requirement(
    "TARGET-022",
    "What trains is A and B of the targeted modules, and nothing else.",
    "LoRA, arXiv 2106.09685, section 4.1 (B1)",
    "model linear trainable targets:list",
    lambda i: cases(i, target_modules=listed),
    slow=2,
)
def target_022(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    try:
        want = matching.targets(kinds_of(spec), spec.config)
    except matching.Refusal:
        return
    trained = implementation.model(spec).trainable()
    check.that(
        trained == {f"{name}.{letter}:default" for name in want for letter in "AB"},
        f"{sorted(trained)} trains, the targets are {sorted(want)}",
    )


@requirement(
    "TARGET-023",
    "Adapting a model changes no weight of it, and no output before training.",
    "D1, I6",
    "model linear init:True write",
    lambda i: models(
        i, target_modules=st.sampled_from((["q_proj"], ["up", "down"], ["head", "layers.10.attn.q_proj"]))
    ),
    slow=2,
)
def target_023(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    for name, (W, b) in model.base().items():
        for got, want, what in ((W, spec.modules[name].W, "weight"), (b, spec.modules[name].b, "bias")):
            if want is not None:
                check.equal(got, want, f"the {what} of {name}")
    x = model_inputs(spec)
    before = model.forward(x)
    for name in model.adapted():
        state = model.read(name)
        model.write(name, 0 * state.A, 0 * state.B)
    check.equal(model.forward(x), before, "the output of a fresh adapter, against that of an update of zeros")


@requirement(
    "TARGET-024",
    "A further adapter finds raw parameters by the same names as the first.",
    "N11: all adapters must target the same set",
    "model linear adapters target_parameters",
    lambda i: cases(i, BLOCK, target_parameters=st.sampled_from((["up.weight"], ["layers.1.attn.q_proj.weight"]))),
    slow=2,
)
def target_024(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    model.add("second", {**spec.config, "r": 1})
    want = matching.targets(kinds_of(spec), spec.config)
    compare(check, model.adapted(), want)
    compare(check, model.adapted("second"), matching.targets(kinds_of(spec), {**spec.config, "r": 1}))
