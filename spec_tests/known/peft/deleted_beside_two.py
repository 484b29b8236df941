"""With two adapters active, deleting a third that is inactive breaks the model: forward looks for the deleted name."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
for name in ("second", "third"):
    model.add_adapter(name, LoraConfig(r=1, target_modules=["0"]))
model.base_model.set_adapter(["second", "third"])  # as PEFT's documentation activates several
x = torch.ones(1, 4)
model(x)
model.delete_adapter("default")
assert model.active_adapters == ["second", "third"]
try:
    model(x)
except KeyError as error:
    print(f"forward raises KeyError: {error}")
else:
    raise AssertionError("forward runs")
