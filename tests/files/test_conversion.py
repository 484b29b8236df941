"""Adapters of a start from the weight, saved as plain adapters of the original base."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref.core.update import delta
from lora_ref.files.conversion import plain_factors
from spec_tests import agree


def test_a_converted_adapter_is_saved_for_inference_as_others_are(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True


def saved(folder: Path, **options: bool) -> tuple[dict, dict, nn.Module]:
    """The configuration and the tensors of a saved PiSSA adapter, and the model."""
    torch.manual_seed(0)
    pissa = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4).double()), pissa)
    model.save_pretrained(folder, **options)
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors"), model


def test_a_folder_is_converted_unless_it_is_asked_not_to_be(tmp_path: Path) -> None:
    config, tensors, _ = saved(tmp_path / "plain")
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    own_config, own, model = saved(tmp_path / "own", convert=False)
    assert (own_config["r"], own_config["init_lora_weights"]) == (2, "pissa")
    factors = {f"base_model.model.0.lora_{name}.weight" for name in "AB"}
    assert tensors.keys() == own.keys() == factors
    A, B = (own[f"base_model.model.0.lora_{name}.weight"] for name in "AB")
    assert torch.equal(A, model.lora_layers()["0"].factors("default")[0]) and B.shape == (4, 2)


@pytest.mark.parametrize("s", [-2.0, 0.5])
def test_any_scaling_but_zero_has_plain_factors(s: float) -> None:
    """s [B | -s0/s B0] [A; A0] = s B A - s0 B0 A0."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3).double()), config)
    model.set_scale("default", s)
    layer = model.lora_layers()["0"]
    A, B = plain_factors(layer, "default", layer.scaling["default"])
    agree(delta(A, B, layer.scaling["default"]), layer.update("default"))
    model.set_scale("default", 0.0)
    with pytest.raises(ValueError, match="scaling 0"):
        plain_factors(layer, "default", 0.0)
