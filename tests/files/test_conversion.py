"""Adapters of a start from the weight, saved as plain adapters of the original base."""

import json
from pathlib import Path

from torch import nn

from lora_ref import LoraConfig, get_peft_model


def test_a_converted_adapter_is_saved_for_inference_as_others_are(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa")
    get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["inference_mode"] is True
