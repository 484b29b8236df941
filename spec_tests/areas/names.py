"""Modules whose names are those that a library of LoRA uses itself: lora_A, base_layer, weight, default."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from ..check import Check
from ..contract import Implementation, ModelSpec, ModuleSpec
from ..generate import ALPHAS, reals, seeds
from ..registry import requirement
from .operations import fill, gives, holds

ANY = "torch.nn.Module.add_module: a name is any string without a dot; none is reserved for a library of adapters"
LIST = "PEFT, LoraConfig.target_modules: a list of names; the modules of these names are adapted (N2)"
#: each stands for a kind of mistake: a name that is searched for, cut off, or replaced
STRANGE = (
    "lora_A", "my_lora_B", "lora_block.proj", "base_layer", "a.base_layer", "weight", "weight.proj", "default",
    "a.default", "base_model", "model.model", "original_module", "modules_to_save", "a_b.c", "a.b_c", "a.b.c", "lora.0",
    "bias.up", "0.1", "10.1",
)  # fmt: skip


@st.composite
def strange(draw: Any, implementation: Implementation, **config: Any) -> ModelSpec:
    """Two to four linear layers with such names; all but the last are targets."""
    rng = np.random.default_rng(draw(seeds))
    names = draw(st.lists(st.sampled_from(STRANGE), min_size=2, max_size=4, unique=True))
    names = [n for n in names if not any(other != n and other.startswith(n + ".") for other in names)]
    last = draw(st.sampled_from(("last", "lora_last", "last.weight", "last_base_layer")))
    modules = {n: ModuleSpec("linear", reals(rng, (3, 3)) / 2, reals(rng, (3,))) for n in [*names, last]}
    options = {"r": 2, "lora_alpha": draw(st.sampled_from(ALPHAS)), "target_modules": names} | config
    if "modules_to_save" in config:
        options["modules_to_save"] = [last]
    return ModelSpec(modules, options, seed=draw(seeds))


def exactly(spec: ModelSpec) -> set[str]:
    """The modules that the list names: the name itself, or its end behind a dot."""
    rule = spec.config["target_modules"]
    return {name for name in spec.modules for item in rule if name == item or name.endswith("." + item)}


@requirement(
    "NAMES-001",
    "The modules of these names are adapted, and no others.",
    f"{ANY}; {LIST}",
    "model linear any_name",
    strange,
)
def names_001(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    check.equal(sorted(implementation.model(spec).adapted()), sorted(exactly(spec)), "the adapted modules")


@requirement(
    "NAMES-002",
    "The output is that of W + s B A under every name, switched off that of the base.",
    ANY,
    "model linear write disable any_name",
    strange,
)
def names_002(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    gives(check, model, spec, [states], "the output")
    model.enable(False)
    gives(check, model, spec, [], "the output, off")


@requirement(
    "NAMES-003",
    "A and B train under every name, and no parameter of the base does.",
    f"{ANY}; LoRA, arXiv 2106.09685, section 4.1: W is frozen, A and B train",
    "model linear trainable any_name",
    strange,
)
def names_003(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    want = sorted(f"{name}.{letter}:default" for name in model.adapted() for letter in "AB")
    check.equal(sorted(model.trainable()), want, "what trains")


@requirement(
    "NAMES-004",
    "An adapter of modules with these names comes back from its folder.",
    f"{ANY}; PEFT, PeftModel.save_pretrained and from_pretrained (V2)",
    "model linear write files any_name",
    strange,
    slow=2,
)
def names_004(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        loaded = implementation.load(spec, Path(place))
    gives(check, loaded, spec, [states], "the output of the loaded model")


@requirement(
    "NAMES-005",
    "Merging and unloading gives plain modules under the same names.",
    f"{ANY}; PEFT, merge_and_unload (U5)",
    "model linear write merge unload any_name",
    strange,
)
def names_005(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    holds(check, model.unload(merge=True), spec, [states], "the unloaded model")


@requirement(
    "NAMES-006",
    "An adapter may have the name of a module, or of a part of one: adding, setting and deleting it does no more.",
    f"{ANY}; PEFT, PeftModel.add_adapter: the name of the adapter is free (U7)",
    "model linear write adapters delete any_name",
    lambda i: st.tuples(strange(i), st.sampled_from(("lora_A", "base_layer", "weight", "proj", "last", "lora", "mod"))),
)
def names_006(implementation: Implementation, case: Any, check: Check) -> None:
    spec, name = case
    model = implementation.model(spec)
    first = fill(model, spec)
    if check.tried(lambda: model.add(name, {**spec.config, "r": 1}) or True) is None:
        return
    second = fill(model, spec, name, salt=1)
    model.set([name])
    gives(check, model, spec, [second], "the output of the second adapter")
    model.set(["default"])
    model.delete(name)
    gives(check, model, spec, [first], "the output after the deletion")


@requirement(
    "NAMES-007",
    "Saved modules of these names come back from their folder.",
    "PEFT, LoraConfig.modules_to_save: modules that are trained and saved besides the adapter (N10)",
    "model linear write modules_to_save files any_name",
    lambda i: strange(i, modules_to_save=True),
    slow=2,
)
def names_007(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    rng = np.random.default_rng([spec.seed, 9])
    W, b = reals(rng, (3, 3)), reals(rng, (3,))
    (last,) = spec.config["modules_to_save"]
    model.write_base(last, W, b)
    with tempfile.TemporaryDirectory() as place:
        model.save(Path(place))
        loaded = implementation.load(spec, Path(place))
    changed = ModelSpec({**spec.modules, last: ModuleSpec("linear", W, b)}, spec.config, spec.dtype, spec.seed)
    gives(check, loaded, changed, [states], "the output of the loaded model")
