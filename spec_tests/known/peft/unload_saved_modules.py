"""unload() returns the trained copy of modules_to_save, and not the base model's module."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
before = net[1].weight.detach().clone()
model = get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
with torch.no_grad():
    model.base_model.model[1].modules_to_save["default"].weight.add_(1)
off = float((model.unload()[1].weight - before).abs().max())
print(f"the weight after unload() is off by {off:.2g}")
assert off > 0.5
