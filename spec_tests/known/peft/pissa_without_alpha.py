"""pissa with lora_alpha=0 is accepted, and fills the base weight with NaN."""

from peft import LoraConfig, get_peft_model
from torch import nn

config = LoraConfig(r=2, lora_alpha=0, target_modules=["0"], init_lora_weights="pissa")
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
weight = model.base_model.model[0].base_layer.weight
print("NaN in the base weight:", bool(weight.isnan().any()))
assert weight.isnan().any()
