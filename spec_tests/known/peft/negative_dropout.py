"""A negative lora_dropout is accepted, and means none."""

from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"], lora_dropout=-0.1))
made = model.base_model.model[0].lora_dropout["default"]
print("lora_dropout=-0.1:", made)
assert isinstance(made, nn.Identity)
