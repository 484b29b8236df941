"""Deleting the active adapter, the only one of the first layer: none is active, another one trains, and calls fail."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
model.add_adapter("other", LoraConfig(r=1, target_modules=["1"]))
model.delete_adapter("default")
trains = [name for name, p in model.named_parameters() if p.requires_grad]
print("active:", model.active_adapters, "trains:", trains)
try:
    model(torch.ones(1, 2))
except KeyError as error:
    print("calling the model raises KeyError:", error)
else:
    raise AssertionError("the model can be called")
assert model.active_adapters == [] and trains
