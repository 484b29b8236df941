"""disable_adapter switches every adapter on at its end, also where an outer disable_adapter is still open."""

import torch
from torch import nn
from torchtune.modules.peft import LoRALinear, disable_adapter

model, x = nn.Sequential(LoRALinear(4, 4, rank=2, alpha=2.0)), torch.ones(1, 4)
nn.init.ones_(model[0].lora_b.weight)
with disable_adapter(model):
    base = model(x)
    with disable_adapter(model):
        pass
    off = float((model(x) - base).detach().abs().max())
print("inside of the outer disable_adapter, after an inner one, the output is off that of the base model by", off)
assert off > 1e-3
