"""Which modules are adapted, with which r, alpha and s: lora_ref and the installed PEFT agree on random models.

Where lora_ref decides differently on purpose, a test of its own says so in its name.
"""

import copy
import warnings
from typing import Any

import peft
import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer as PeftLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_ref
from lora_ref.targeting import ARCHITECTURES
from lora_ref.wrappers import ModulesToSave

# ends of each other (q_proj, xq_proj), lists of layers and of experts, heads, numbers
NAMES = """model layers blocks self_attn mlp experts q_proj xq_proj v_proj up down score classifier lm_head proj
    0 1 2 3 10""".split()
LEAVES = {
    "linear": lambda: nn.Linear(2, 2),
    "conv1d": lambda: Conv1D(2, 2),
    "embedding": lambda: nn.Embedding(2, 2),
    "conv": lambda: nn.Conv2d(2, 2, 1),
    "relu": nn.ReLU,
}
LEAF_KINDS = st.sampled_from(["linear"] * 6 + list(LEAVES))


def build(tree: dict[str, Any]) -> nn.Module:
    """A model from nested dicts; the leaves name a kind of layer."""
    model = nn.Module()
    for name, child in tree.items():
        model.add_module(name, build(child) if isinstance(child, dict) else LEAVES[child]())
    return model


def blocks(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), LEAF_KINDS, min_size=1, max_size=3)


def numbered(child: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(["0", "1", "2", "10"]), child, min_size=1, max_size=3)


ATTENTION, EXPERTS = blocks("q_proj", "xq_proj", "v_proj"), numbered(blocks("up", "down", "proj"))
LAYER = st.fixed_dictionaries({"self_attn": ATTENTION}, optional={"experts": EXPERTS, "mlp": blocks("up", "down")})
TRANSFORMER = st.fixed_dictionaries({"layers": numbered(LAYER)}, optional={"blocks": numbered(ATTENTION)})
ANYTHING = st.dictionaries(
    st.sampled_from(NAMES),
    st.recursive(LEAF_KINDS, lambda child: st.dictionaries(st.sampled_from(NAMES), child, min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)
HEADS = {name: st.just("linear") for name in ("lm_head", "score", "classifier")}
TREES = ANYTHING | TRANSFORMER | st.fixed_dictionaries({"model": TRANSFORMER}, optional=HEADS)


@st.composite
def ends(draw: st.DrawFn, modules: list[str]) -> str:
    """A module's name or a dotted end of it, or, rarely, any word."""
    parts = draw(st.sampled_from(modules)).split(".")
    return draw(st.sampled_from([".".join(parts[i:]) for i in range(len(parts))] * 3 + NAMES))


@st.composite
def expressions(draw: st.DrawFn, modules: list[str]) -> str:
    end = draw(ends(modules))
    dotless = end.replace(".", r"\.")
    template = st.sampled_from([".*{}", r".*\.{}", "{}", r"({}|.*\.(q|v)_proj)", r".*\.[02]\..*", ".*(proj|up)", "^.*{}$"])
    return draw(template).format(dotless)


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and options that hit some of it."""
    model = build(draw(TREES))
    modules = [name for name, _ in model.named_modules() if name]
    leaves = [name for name, module in model.named_modules() if name and not list(module.children())]
    some = st.lists(ends(leaves), max_size=4, unique=True)
    of_any = st.lists(ends(modules), max_size=2, unique=True)
    targets = draw(
        st.one_of(
            some,
            some.filter(bool),
            st.lists(st.sampled_from(leaves), min_size=1, max_size=3),
            expressions(leaves),
            st.sampled_from(["all-linear", "ALL-Linear"]),
        )
    )
    options: dict[str, Any] = {"target_modules": targets, "r": draw(st.integers(1, 9))}
    options["lora_alpha"] = draw(st.sampled_from([0, 1, 8, 16, -4, 2.5]))
    options["use_rslora"] = draw(st.booleans())
    if draw(st.integers(0, 2)) == 0:
        options["exclude_modules"] = draw(of_any | expressions(modules))
    if draw(st.integers(0, 2)) == 0:
        options["modules_to_save"] = draw(of_any)
    if draw(st.integers(0, 3)) == 0 or (isinstance(targets, list) and draw(st.booleans())):
        indices = st.sampled_from([0, 1, 2, 3, 10, -1])
        options["layers_to_transform"] = draw(indices | st.lists(indices, min_size=1, max_size=3))
        lists = st.sampled_from(["layers", "blocks", "experts", "self_attn", r"lay\w+"])
        options["layers_pattern"] = draw(st.none() | lists | st.lists(lists, min_size=1, max_size=2))
    keys = st.one_of(ends(leaves), expressions(leaves), ends(leaves).map("^{}".format), st.just("^layers.0.*"))
    options["rank_pattern"] = draw(st.dictionaries(keys, st.integers(1, 9), max_size=2))
    options["alpha_pattern"] = draw(st.dictionaries(keys, st.sampled_from([1, 32, 0.5]), max_size=2))
    options["task_type"] = draw(st.sampled_from([None, None, "FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS"]))
    return model, {key: value for key, value in options.items() if value is not None}


def outcome(library: Any, model: nn.Module, options: dict[str, Any]) -> dict[str, Any] | None:
    """What get_peft_model does to a copy of the model: adapted modules and modules saved whole; None: ValueError."""
    model = copy.deepcopy(model)
    layer, whole = (PeftLayer, ModulesToSaveWrapper) if library is peft else (lora_ref.LoraLayer, ModulesToSave)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            library.get_peft_model(model, library.LoraConfig(**options))
        except ValueError:
            return None
    named = list(model.named_modules())
    return {
        "adapted": {
            name: (m.r["default"], m.lora_alpha["default"], m.scaling["default"])
            for name, m in named
            if isinstance(m, layer)
        },
        "saved": sorted(name for name, m in named if isinstance(m, whole)),
    }


def is_clean_suffix(model: nn.Module, item: str) -> bool:
    """Does item mean the same by PEFT's plain `endswith` as by dotted ends, with no hit inside another?"""
    plain = [name for name, _ in model.named_modules() if name.endswith(item)]
    return all(name == item or name.endswith("." + item) for name in plain)


@given(cases())
def test_the_same_modules_are_adapted_with_the_same_rank_alpha_and_scaling(case: tuple[nn.Module, dict[str, Any]]) -> None:
    model, options = case
    save = [*options.get("modules_to_save", [])]
    save += ["classifier", "score"] if options.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") else []
    assume(all(is_clean_suffix(model, item) for item in save))
    saved = [name for name, _ in model.named_modules() if any(name == s or name.endswith("." + s) for s in save)]
    assume(not any(inner.startswith(outer + ".") for inner in saved for outer in saved))

    theirs, ours = outcome(peft, model, options), outcome(lora_ref, model, options)
    event("refused" if theirs is None else f"{min(len(theirs['adapted']), 3)} adapted, {len(theirs['saved'])} saved")
    assert ours == theirs
    if ours is not None:
        rows = lora_ref.explain(model, lora_ref.LoraConfig(**options)).to_dict()["modules"]
        told = {name: (m["r"], m["lora_alpha"], m["scaling"]) for name, m in rows.items() if m["action"] == "adapt"}
        assert told == ours["adapted"]
        assert sorted(name for name, m in rows.items() if m["action"] == "save") == ours["saved"]
