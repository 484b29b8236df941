"""Models that are more than chains of plain layers: modules called twice, weights held twice, many targets."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, Model, ModelSpec, ModuleSpec
from ..generate import ALPHAS, reals, seeds
from ..registry import requirement
from .operations import fill, gives, weight

PAPER = "LoRA, arXiv 2106.09685, section 4.1: h = W x + B A x wherever W is used; merged, W + B A takes its place"
TIED = "torch.nn.Module.named_parameters: a parameter that two modules hold is one parameter"
LIST = "PEFT, LoraConfig.target_modules: a list of names; the modules of these names are adapted (N2)"
SAVED = "PEFT, LoraConfig.modules_to_save: modules that are trained and saved besides the adapter (N10)"


@st.composite
def used_twice(draw: Any, implementation: Implementation) -> ModelSpec:
    """Three linear layers, of which the first two are called twice."""
    rng = np.random.default_rng(draw(seeds))
    modules = {n: ModuleSpec("linear", reals(rng, (3, 3)) / 2, reals(rng, (3,))) for n in ("a", "b", "c")}
    config = {"r": draw(st.integers(1, 2)), "lora_alpha": draw(st.sampled_from(ALPHAS)), "target_modules": ["a", "b"]}
    calls = draw(st.sampled_from((("a", "b", "a", "c"), ("a", "a", "b", "c", "b"))))
    return ModelSpec(modules, config, seed=draw(seeds), calls=calls)


@st.composite
def tied(draw: Any, implementation: Implementation) -> ModelSpec:
    """An embedding whose table is the weight of the head; one of the two is adapted."""
    rng = np.random.default_rng(draw(seeds))
    table = reals(rng, (5, 3))
    modules = {
        "emb": ModuleSpec("embedding", table.T.copy()),
        "proj": ModuleSpec("linear", reals(rng, (3, 3)), reals(rng, (3,))),
        "head": ModuleSpec("linear", table),
    }
    config = {"r": 2, "lora_alpha": draw(st.sampled_from(ALPHAS))}
    config["target_modules"] = draw(st.sampled_from((["emb", "proj"], ["head", "proj"])))
    return ModelSpec(modules, config, seed=draw(seeds), tied={"head": "emb"})


@st.composite
def many(draw: Any, implementation: Implementation) -> ModelSpec:
    """Thirty layers with names that are ends of one another, and up to thirty of them as targets."""
    rng = np.random.default_rng(draw(seeds))
    names = [f"{n}.{part}" for n in range(10) for part in ("q", "qq", "proj_q")]
    modules = {name: ModuleSpec("linear", reals(rng, (2, 2)) / 2, None) for name in names}
    chosen = draw(st.permutations(names))[: draw(st.sampled_from((1, 19, 20, 21, 25)))]
    config = {"r": 1, "lora_alpha": 2, "target_modules": sorted(chosen)}
    return ModelSpec(modules, config, seed=draw(seeds))


@st.composite
def several_saved(draw: Any, implementation: Implementation) -> ModelSpec:
    """Saved modules of which one's name is the beginning or the end of another's."""
    rng = np.random.default_rng(draw(seeds))
    names = ("up", "head", "head2", "my_head", "b.head", "b.heads")
    modules = {name: ModuleSpec("linear", reals(rng, (3, 3)) / 2, reals(rng, (3,))) for name in names}
    saved = draw(st.lists(st.sampled_from(names[1:]), min_size=1, max_size=3, unique=True))
    config = {"r": 1, "lora_alpha": 2, "target_modules": ["up"], "modules_to_save": sorted(saved)}
    return ModelSpec(modules, config, seed=draw(seeds))


def named(spec: ModelSpec) -> set[str]:
    """The saved modules: of the given names, or with such a name behind the last dot (b.head for head)."""
    items = spec.config["modules_to_save"]
    return {n for n in spec.modules for item in items if n == item or n.endswith("." + item)}


def refused_or_made(implementation: Implementation, spec: ModelSpec, check: Check) -> Model | None:
    return check.tried(lambda: implementation.model(spec))  # type: ignore[no-any-return]


@requirement(
    "STRUCT-001",
    "A module that is called twice in a pass has its update at both calls.",
    PAPER,
    "model linear write used_twice",
    used_twice,
)
def struct_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    gives(check, model, spec, [states], "the output")


@requirement(
    "STRUCT-002",
    "A module that is called twice is merged once, and unmerged once.",
    PAPER,
    "model linear write merge unmerge used_twice",
    used_twice,
)
def struct_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.merge()
    gives(check, model, spec, [states], "the merged output")
    model.unmerge()
    gives(check, model, spec, [states], "the output after unmerging")


@requirement(
    "STRUCT-003",
    "Adapting one of two modules with one weight leaves the other's output alone, or is refused.",
    f"{PAPER}; {TIED}",
    "model linear embedding write tied",
    tied,
)
def struct_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    if model := refused_or_made(implementation, spec, check):
        states = fill(model, spec)
        gives(check, model, spec, [states], "the output")


@requirement(
    "STRUCT-004",
    "Merging one of two modules with one weight keeps the output of the model, or is refused.",
    f"{PAPER}; {TIED}",
    "model linear embedding write merge tied",
    tied,
)
def struct_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    if model := refused_or_made(implementation, spec, check):
        states = fill(model, spec)
        check.tried(model.merge)
        gives(check, model, spec, [states], "the output after merging")


@requirement(
    "STRUCT-005",
    "Unloading with merging keeps the output of a model whose modules share a weight, or is refused.",
    f"{PAPER}; {TIED}; PEFT, merge_and_unload (U5)",
    "model linear embedding write unload merge tied",
    tied,
)
def struct_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    if model := refused_or_made(implementation, spec, check):
        states = fill(model, spec)
        if plain := check.tried(lambda: model.unload(merge=True)):
            for name in spec.modules:
                want, size = weight(spec, name, [states])
                check.close(plain[name][0], want, size, spec.dtype, f"{name}.weight of the unloaded model")


@requirement(
    "STRUCT-006",
    "Of one to thirty names each is adapted, and no other module.",
    LIST,
    "model linear targets:list",
    many,
    slow=2,
)
def struct_006(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    check.equal(sorted(model.adapted()), spec.config["target_modules"], "the adapted modules")


@requirement(
    "STRUCT-007",
    "A folder of an adapter with one to thirty targets adapts the same modules when it is loaded.",
    f"{LIST}; PEFT, PeftModel.from_pretrained: the folder's configuration is used (V2)",
    "model linear write files targets:list",
    many,
    slow=4,
)
def struct_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        loaded = implementation.load(spec, Path(place))
    check.equal(sorted(loaded.adapted()), spec.config["target_modules"], "the adapted modules of the loaded model")
    for name, state in states.items():
        check.equal(loaded.read(name).B, state.B, f"B of {name} after loading")


@requirement(
    "STRUCT-008",
    "Of modules with similar names those that modules_to_save names train, and no others.",
    SAVED,
    "model linear modules_to_save trainable",
    several_saved,
)
def struct_008(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    copies = {f"{name}.{part}:default" for name in named(spec) for part in ("weight", "bias")}
    check.equal(sorted(model.trainable()), sorted(copies | {"up.A:default", "up.B:default"}), "what trains")


@requirement(
    "STRUCT-009",
    "Of modules with similar names each saved one comes back from a folder with its own weight.",
    f"{SAVED}; PEFT, PeftModel.save_pretrained (V3)",
    "model linear write modules_to_save files",
    several_saved,
    slow=2,
)
def struct_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    rng = np.random.default_rng([spec.seed, 9])
    changed = dict(spec.modules)
    for name in sorted(named(spec)):
        W, b = reals(rng, (3, 3)), reals(rng, (3,))
        model.write_base(name, W, b)
        changed[name] = ModuleSpec("linear", W, b)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        loaded = implementation.load(spec, Path(place))
    gives(check, loaded, dataclasses.replace(spec, modules=changed), [states], "the output of the loaded model")
