"""Names: modules and adapters whose names have parts that a library uses itself, or that are parts of one another."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, Model, ModelSpec, ModuleSpec
from ..generate import reals, seeds
from ..registry import requirement
from .operations import fill, gives, holds
from .structures import FILES, NAMED, SAME, loaded, options

FROZEN = "LoRA, arXiv 2106.09685, section 4.1: W_0 is frozen and receives no gradient updates, A and B train (B1)"
COPIES = "PEFT, LoraConfig.modules_to_save: modules to be set as trainable and saved in the checkpoint (Z2)"
APART = "PEFT, PeftModel.save_pretrained: selected_adapters is the list of the adapters to be saved (X1)"

#: parts of a library's own keys, an adapter's name, numbers, and names that differ by "." and "_" alone
POOL = (
    "lora_A",
    "lora_head",
    "my_lora_",
    "block.lora_B",
    "block.base_layer",
    "x.weight",
    "x.bias_",
    "default",
    "block.default",
    "other.q",
    "a.b",
    "a_b",
    "0",
    "1",
    "10",
    "layers.1.q",
    "layers.11.q",
    "layers.1_1.q",
    "proj",
    "xproj",
    "proj_x",
    "proj2",
    "original",
    "modules_to_save_",
)
#: names that are easily taken for one another
ALIKE = (
    ("a.b", "a_b"),
    ("1", "11"),
    ("proj", "xproj"),
    ("proj", "proj_x"),
    ("layers.1.q", "layers.11.q"),
    ("lora_A", "lora_A_"),
    ("block.default", "block_default"),
)
HEADS = ("head", "xhead", "head_x", "head2", "lora_head", "block.head2", "lora_A_head")


@st.composite
def strange(draw: Any, implementation: Implementation) -> ModelSpec:
    """Two to seven square layers with names of the pool; some are targets, by their full names, one of two alike."""
    alike = draw(st.sampled_from(ALIKE))
    others = [name for name in draw(st.lists(st.sampled_from(POOL), max_size=5, unique=True)) if name not in alike]
    targets = [alike[0], *(name for name in others if draw(st.booleans()))]
    rule = "|".join(map(re.escape, targets))
    return ModelSpec(squares(draw, [*alike, *others]), options(draw, rule), seed=draw(seeds))


def squares(draw: Any, names: Any) -> dict[str, ModuleSpec]:
    rng = np.random.default_rng(draw(seeds))
    return {n: ModuleSpec("linear", reals(rng, (2, 2)), reals(rng, (2,))) for n in names}


@st.composite
def saving(draw: Any, implementation: Implementation) -> ModelSpec:
    """Heads whose names are parts of one another, of which some are saved, after an adapted layer."""
    names = draw(st.permutations(HEADS))
    kept = names[: draw(st.integers(1, len(names) - 1))]
    config = options(draw, ["body"]) | {"modules_to_save": kept}
    return ModelSpec(squares(draw, ["body", *names]), config, seed=draw(seeds))


def copied(spec: ModelSpec) -> list[str]:
    """The modules that modules_to_save names: whole, or after a dot."""
    kept = spec.config["modules_to_save"]
    return [n for n in spec.modules if any(n == item or n.endswith("." + item) for item in kept)]


def train(model: Model, spec: ModelSpec) -> ModelSpec:
    """Give each copy other weights; the spec of a model that has them in place of the originals."""
    rng, modules = np.random.default_rng([spec.seed, 31]), dict(spec.modules)
    for name in copied(spec):
        W, b = reals(rng, (2, 2)), reals(rng, (2,))
        model.write_base(name, W, b)
        modules[name] = ModuleSpec("linear", W, b)
    return ModelSpec(modules, spec.config, spec.dtype, spec.seed)


@st.composite
def prefixes(draw: Any, implementation: Implementation) -> tuple[ModelSpec, list[str]]:
    """A model, and further adapters whose names begin with, or are a part of, one another's or a module's."""
    pool = ("default_2", "default2", "fault", "de", "body", "body_2", "weight", "lora_A", "1", "11")
    names = draw(st.lists(st.sampled_from(pool), min_size=1, max_size=3, unique=True))
    modules = squares(draw, ["body", "block.default", "weight.q"])
    return ModelSpec(modules, options(draw, list(modules)), seed=draw(seeds)), names


@requirement(
    "NAMES-001",
    "A module of any name gets an adapter where it is named, no other does, and the adapter acts.",
    NAMED,
    "model linear any_name targets:regex write",
    strange,
)
def names_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    want = [n for n in spec.modules if re.fullmatch(spec.config["target_modules"], n)]
    check.equal(sorted(model.adapted()), sorted(want), "the adapted modules")
    gives(check, model, spec, [fill(model, spec)], "the output")


@requirement(
    "NAMES-002",
    "Whatever the names of the modules, A and B train and nothing else does.",
    FROZEN,
    "model linear any_name trainable targets:regex",
    strange,
)
def names_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    want = [f"{n}.{letter}:default" for n in model.adapted() for letter in "AB"]
    check.equal(sorted(model.trainable()), sorted(want), "what trains")


@requirement(
    "NAMES-003",
    "Whatever the names of the modules, an adapter is saved and loaded again.",
    FILES,
    "model linear any_name files targets:regex write",
    strange,
    slow=2,
)
def names_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    again = loaded(implementation, spec, model)
    gives(check, again, spec, [states], "the output of the loaded adapter")


@requirement(
    "NAMES-004",
    "Whatever the names of the modules, unloading with merging gives each its own update.",
    SAME,
    "model linear any_name merge unload targets:regex write",
    strange,
)
def names_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    holds(check, model.unload(merge=True), spec, [states], "the plain model")


@requirement(
    "NAMES-005",
    "Of several heads whose names are parts of one another, those that are named are saved and loaded.",
    f"{COPIES}; {FILES}",
    "model linear any_name modules_to_save files write",
    saving,
    slow=2,
)
def names_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    trained = train(model, spec)
    again = loaded(implementation, spec, model)
    gives(check, again, trained, [states], "the output of the loaded adapter")


@requirement(
    "NAMES-006",
    "Of several heads whose names are parts of one another, those that are named train, and no others.",
    "lora_ref's decision: an item of modules_to_save matches whole names, and ends of names from a dot on (N10)",
    "model linear any_name modules_to_save trainable decision:whole_segments",
    saving,
)
def names_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    got = {name for name in implementation.model(spec).trainable() if not name.startswith("body.")}
    want = {f"{n}.{p}:default" for n in copied(spec) for p in ("weight", "bias")}
    check.equal(sorted(got), sorted(want), "what trains besides A and B")


@requirement(
    "NAMES-007",
    "Adapters whose names are parts of one another's, or of a module's, act apart.",
    "PEFT, PeftModel.add_adapter and set_adapter: an adapter has a name, and is made active by it (U7)",
    "model linear any_name adapters write",
    prefixes,
)
def names_007(implementation: Implementation, case: Any, check: Check) -> None:
    spec, names = case
    model = implementation.model(spec)
    states = {"default": fill(model, spec)}
    for salt, name in enumerate(names, 1):
        model.add(name, spec.config)
        states[name] = fill(model, spec, name, salt)
    for name, state in states.items():
        model.set([name])
        gives(check, model, spec, [state], f"the output of {name!r}")


@requirement(
    "NAMES-008",
    "Adapters whose names are parts of one another's, or of a module's, are saved and loaded apart.",
    APART,
    "model linear any_name adapters files write",
    prefixes,
    slow=2,
)
def names_008(implementation: Implementation, case: Any, check: Check) -> None:
    spec, names = case
    model = implementation.model(spec)
    states = {"default": fill(model, spec)}
    for salt, name in enumerate(names, 1):
        model.add(name, spec.config)
        states[name] = fill(model, spec, name, salt)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        for name, state in states.items():
            again = implementation.load(spec, Path(place) if name == "default" else Path(place) / name)
            gives(check, again, spec, [state], f"the output of {name!r}, loaded")


@requirement(
    "NAMES-009",
    "A list of one to thirty names, and an expression of the same names, adapt the same modules.",
    'PEFT, LoraConfig.target_modules: a string is matched as a regex, a list exactly or by "."-suffix (N1)',
    "model linear any_name targets:regex",
    lambda i: st.tuples(st.integers(1, 30), st.integers(0, 3), seeds),
    slow=3,
)
def names_009(implementation: Implementation, case: Any, check: Check) -> None:
    count, more, seed = case
    rng = np.random.default_rng(seed)
    names = [f"layers.{i}.q{i}" for i in range(count + more)]
    modules = {name: ModuleSpec("linear", reals(rng, (2, 2))) for name in names}
    wanted = [str(name) for name in rng.permutation(names)[:count]]
    lists = ([name for name in wanted], [name.rpartition(".")[2] for name in wanted])
    for rule in (*lists, "|".join(map(re.escape, wanted))):
        model = implementation.model(ModelSpec(modules, {"r": 1, "lora_alpha": 1, "target_modules": rule}))
        check.equal(sorted(model.adapted()), sorted(wanted), f"the modules of {rule}")
