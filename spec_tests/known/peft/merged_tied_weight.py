"""An embedding and a head hold one weight: merging the adapter of the one changes the other."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

base = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3, bias=False))
base[1].weight = base[0].weight
model = get_peft_model(base, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)).eval()
x = torch.tensor([0, 1, 2])
before = model(x)
model.merge_adapter()
off = float((model(x) - before).abs().max())
print("merging changes the output by", round(off, 3))
assert off > 1e-3
