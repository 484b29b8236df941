"""add_weighted_adapter takes two adapters with one weight, and ignores the second adapter."""

from peft import LoraConfig, get_peft_model
from torch import nn

config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
model.add_adapter("second", config)
model.add_weighted_adapter(["default", "second"], [1.0], "new", combination_type="linear")
print("two adapters with one weight: accepted")
