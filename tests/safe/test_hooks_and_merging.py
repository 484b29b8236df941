"""A base layer with forward hooks: merging moves the update to where the hooks see it, and says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lora_ref
from spec_tests.rounding import agree, distance


def adapted() -> lora_ref.PeftModel:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    return lora_ref.get_peft_model(net, lora_ref.LoraConfig(target_modules=["0"], init_lora_weights=False))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_warns_of_forward_hooks_of_the_base(register: str, merge: str) -> None:
    model = adapted()
    base = model.base_model.model[0].get_base_layer()
    getattr(base, register)(lambda module, *seen: 2 * seen[-1] if len(seen) == 2 else (2 * seen[0][0],))
    x = torch.randn(3, 4, dtype=torch.float64)
    before = model(x)
    with pytest.warns(UserWarning, match="^0: the base layer has forward hooks"):
        merged = getattr(model, merge)()
    assert distance((merged or model)(x), before) > 0.01, "the warning would be of nothing"


def test_merging_one_layer_warns_too() -> None:
    layer = adapted().base_model.model[0]
    layer.get_base_layer().register_forward_hook(lambda module, x, y: 2 * y)
    with pytest.warns(UserWarning, match="forward hooks"):
        layer.merge()


def test_merging_does_not_warn_of_other_hooks() -> None:
    model = adapted()
    model.base_model.model[0].register_forward_hook(lambda module, x, y: 2 * y)  # it sees the sum, merged or not
    model.base_model.model[1].register_forward_hook(lambda module, x, y: 2 * y)
    x = torch.randn(3, 4, dtype=torch.float64)
    before = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    agree(model(x), before)
