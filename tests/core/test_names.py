"""Which modules, which rank: what the conformance suite does not ask of a model, on names alone.

The suite has the rules themselves (spec_tests/areas/targeting.py and patterns.py).
"""

import re

import pytest
from configs import module_names, patterns
from hypothesis import example, given
from hypothesis import strategies as st

from lora_ref import LoraConfig
from lora_ref.core.names import ModelNames, Rule, layer_index, layer_lists, resolve

NAMES = ModelNames(
    {
        "model": "",
        "model.layers.0": "",
        "model.layers.0.q_proj": "linear",
        "model.layers.1.up": "linear",
        "model.conv": "conv",
        "lm_head": "linear",
    },
    parameters=("lm_head.weight",),
    left_out={"lm_head": "the output layer"},
)


def adapted(action: str = "adapt", **options: object) -> list[str]:
    return resolve(NAMES, LoraConfig(**options)).names(action)


def test_all_linear_leaves_out_the_output_layer_and_is_a_name_in_a_list() -> None:
    every = [name for name, kind in NAMES.kinds.items() if kind == "linear" and name != "lm_head"]
    assert adapted(target_modules="all-linear") == every
    assert adapted(target_modules=["all-linear"]) == []


def test_what_lies_in_a_saved_module_is_saved_with_it_and_not_adapted() -> None:
    options = {"target_modules": ["q_proj", "up"], "modules_to_save": ["layers.0", "q_proj"]}
    assert adapted("save", **options) == ["model.layers.0"]
    assert adapted(**options) == ["model.layers.1.up"]


def test_without_targets_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Please specify target_modules: it is None.*model_type='another'"):
        resolve(ModelNames({"up": "linear"}, model_type="another"), LoraConfig())
    assert adapted("adapt parameter", target_parameters=["lm_head.weight"]) == ["lm_head.weight"]


def test_all_linear_does_not_spell_out_what_is_excluded() -> None:
    """PEFT would take excluded names in the file for experts, in a model that has them as raw parameters."""
    names = ModelNames({"a.q": "linear", "a.up": "linear", "b.up": "linear"})
    plan = resolve(names, LoraConfig(target_modules="all-linear", exclude_modules=["up"]))
    assert plan.target_modules == ["a.q"] and plan.unused == {}
    assert [match.rule for match in plan.matches][1:] == ["exclude_modules 'up'"] * 2


def test_without_an_output_embedding_nothing_is_left_out() -> None:
    plan = resolve(ModelNames({"a": "linear", "lm_head": "linear"}), LoraConfig(target_modules="all-linear"))
    assert plan.names("adapt") == plan.target_modules == ["a", "lm_head"]


@pytest.mark.parametrize(
    ("name", "pattern", "index"),
    [
        ("model.layers.3.q", None, 3),
        ("layers.3.q", None, 3),
        ("layers.3.q", "layers", 3),
        ("a.b.c.7.q", None, 7),
        ("model.h.2.q", ["layers", "h"], 2),
        ("model.layers.3", None, None),  # the list's entry itself
        ("model.layers.12.experts.4.up", "layers|h", 12),
        ("model.xlayers.3.q", "layers", None),
    ],
)
def test_the_index_of_a_layer(name: str, pattern: str | list[str] | None, index: int | None) -> None:
    assert layer_index(name, layer_lists(pattern)) == index


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", None])
@pytest.mark.parametrize("head", ["score", "classifier"])
def test_classification_saves_its_head_without_being_asked(task: str | None, head: str) -> None:
    names = ModelNames({"q": "linear", head: "linear"})
    plan = resolve(names, LoraConfig(target_modules=["q"], task_type=task))
    assert plan.names("save") == ([head] if task in ("SEQ_CLS", "TOKEN_CLS") else [])
    assert plan.unused == {}  # and the head that is not there is not missed


def ends_at_dot(item: str, name: str) -> bool:
    return name == item or name.endswith(f".{item}")


@example(items=["q", "a.q"], names=["x.a.q"])
@given(items=st.lists(module_names, max_size=5), names=st.lists(module_names, max_size=6))
def test_a_rule_matches_as_a_scan_of_its_items_does(items: list[str], names: list[str]) -> None:
    rule = Rule("target_modules", items)
    used = set()
    for name in names:
        fitting = [item for item in items if ends_at_dot(item, name)]
        hit = rule.match(name)
        assert (hit is not None) is bool(fitting)
        if fitting:
            assert hit == max(fitting, key=len)  # the full name comes first
        used |= set(fitting)
    assert rule.used == used


@given(pattern=st.dictionaries(patterns, st.integers(1, 9), max_size=4), names=st.lists(module_names, max_size=6))
def test_a_dict_matches_by_the_first_key_that_peft_would_match(pattern: dict[str, int], names: list[str]) -> None:
    ours = Rule("rank_pattern", pattern)
    hits = [next((k for k in pattern if re.match(rf"(.*\.)?({k})$", name)), None) for name in names]
    assert [ours.match(name) for name in names] == hits


def test_of_targets_in_numbered_layers_only_those_that_are_asked_for() -> None:
    options = {"target_modules": ["q_proj", "up"]}
    assert adapted(**options) == ["model.layers.0.q_proj", "model.layers.1.up"]
    assert adapted(layers_to_transform=1, **options) == ["model.layers.1.up"]
    assert adapted(layers_to_transform=[0], layers_pattern="layers", **options) == ["model.layers.0.q_proj"]
    assert adapted(layers_to_transform=[0, 1], layers_pattern="blocks", **options) == []
