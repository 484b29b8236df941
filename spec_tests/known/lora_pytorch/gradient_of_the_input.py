"""The base layers run without gradients, so a gradient misses all that goes through the weights of later layers."""

import torch
from lora_pytorch import LoRA
from torch import nn

torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
model = LoRA.from_module(plain, rank=2)
first = model.module[0].lora_module
nn.init.normal_(first.out_proj)
x = torch.ones(1, 4)
model(x).sum().backward()
got = first.in_proj.grad
step = 1e-2
with torch.no_grad():
    low = model(x).item()
    first.in_proj[0, 0] += step
    want = (model(x).item() - low) / step
print(f"the gradient of the first layer's A at [0, 0] is {got[0, 0].item():.3g}; the output grows by {want:.3g} a unit")
assert got[0, 0] == 0 and abs(want) > 0.01
