"""An adapter that is added inside rescale_adapter_scale has no scaling after it, and cannot be used."""

import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn

config = LoraConfig(target_modules=["0"])
model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config)
with rescale_adapter_scale(model, 0.5):
    model.add_adapter("other", config)
print("the scaling after the context:", model.base_model.model[0].scaling)
model.set_adapter("other")
try:
    model(torch.ones(1, 2))
except KeyError as error:
    print("the forward pass with the added adapter fails: KeyError", error)
else:
    raise AssertionError("the added adapter can be used")
