"""`explain`: which modules a configuration adapts, and why."""

import re

import pytest
from torch import nn

from lora_ref import LoraConfig, explain, get_peft_model, inject_adapter_in_model
from lora_ref.core.names import Targeting


def plan_of_a_small_net() -> Targeting:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    return explain(net, LoraConfig(r=4, target_modules=["0", "9"], exclude_modules=["2"], rank_pattern={"0": 2}))


def test_explain_as_a_dict() -> None:
    assert plan_of_a_small_net().to_dict() == {
        "modules": {
            "0": {
                "action": "adapt",
                "rule": "target_modules '0', rank_pattern '0'",
                "r": 2,
                "lora_alpha": 8,
                "scaling": 4.0,
            },
            "1": {"action": "", "rule": "no target matches", "r": None, "lora_alpha": None, "scaling": None},
            "2": {"action": "", "rule": "exclude_modules '2'", "r": None, "lora_alpha": None, "scaling": None},
        },
        "unused": {"target_modules": ["9"]},
    }


def test_explain_as_a_table() -> None:
    text = str(plan_of_a_small_net())
    assert re.search(r"0 +│ adapt +│ target_modules '0', rank_pattern '0' +│ +2 │ +8 │ +4", text)
    assert "no target matches" in text and "exclude_modules '2'" in text
    assert "target_modules '9' matched nothing" in text


def test_explain_changes_nothing_and_agrees_with_what_is_then_adapted() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    config = LoraConfig(target_modules=["0"], layers_to_transform=None)
    plan = explain(net, config)
    assert type(net[0]) is nn.Linear and plan.names("adapt") == ["0", "1.0"]
    model = get_peft_model(net, config)
    assert model.targeted_module_names == plan.names("adapt") == explain(model, config).names("adapt")


def test_explain_is_about_the_active_adapter_or_else_the_first() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    model.add_adapter("other", LoraConfig(r=1, target_modules=["1"]))
    assert explain(model).names("adapt") == ["0"]
    model.set_adapter("other")
    assert explain(model).names("adapt") == ["1"]
    model.base_model.active_adapters = []
    assert explain(model).names("adapt") == ["0"] and explain(model, "other").names("adapt") == ["1"]


def test_explain_finds_the_adapters_of_an_injected_model() -> None:
    net = inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    assert explain(net).to_dict()["modules"]["0"]["action"] == "adapt"
    with pytest.raises(ValueError, match="there is no adapter 'other'"):
        explain(net, "other")
