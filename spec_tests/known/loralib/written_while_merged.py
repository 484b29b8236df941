"""A and B change while the layer is merged: train() subtracts another update than eval() has added."""

import loralib
import torch

layer = loralib.Linear(2, 2, r=1)
torch.nn.init.ones_(layer.lora_B)
before = layer.weight.detach().clone()
layer.eval()  # merges
layer.lora_B.data *= 2
layer.train()  # unmerges
off = float((layer.weight - before).abs().max())
print("after merging and unmerging the base weight is off by", round(off, 3))
assert off > 1e-3
