"""Saving sorts rank_pattern and alpha_pattern, though their first match counts: loaded, the scaling is another."""

import tempfile

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], alpha_pattern={"^0": 8, ".*": 2})
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
before = model.base_model.model[0].scaling["default"]
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), folder)
after = again.base_model.model[0].scaling["default"]
print(f"scaling before saving: {before}, after loading: {after}")
assert before != after
