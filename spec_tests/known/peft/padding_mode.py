"""A convolution that pads by reflection: the branch pads with zeros, so merging changes the output."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

base = nn.Sequential(nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect"))
model = get_peft_model(base, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)).eval()
x = torch.tensor([[[1.0, 2.0, 4.0, 8.0]]])
before = model(x)
model.merge_adapter()
off = (model(x) - before).abs().flatten()
print("merging changes the output by", [round(v, 4) for v in off.tolist()])
assert off[0] > 1000 * off[1:-1].max()
