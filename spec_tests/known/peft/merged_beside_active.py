"""Merging one of two active adapters by name: the other one is still active, and is left out of the forward pass."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config).eval()
model.add_adapter("second", config)
model.base_model.set_adapter(["default", "second"])
x = torch.randn(3, 4)
with torch.no_grad():
    both = model(x)
    model.merge_adapter(["second"])
    now = model(x)
assert model.active_adapters == ["default", "second"]
assert (both - now).abs().max() > 1e-3
print(f"active: {model.active_adapters}; the output has changed by up to {float((both - now).abs().max()):.3f}")
