"""The padding_idx of an embedding is not taken over: the row of A at it gets a gradient, that of a plain layer none."""

import torch
from lora_pytorch import LoRA
from torch import nn

plain = nn.Embedding(4, 2, padding_idx=1)
plain(torch.tensor([1])).sum().backward()
layer = LoRA.from_module(nn.Embedding(4, 2, padding_idx=1), rank=2)
nn.init.ones_(layer.lora_module.out_proj)
layer(torch.tensor([1])).sum().backward()
got = layer.lora_module.in_proj.grad[1]
print("the gradients at padding_idx: of the plain layer", plain.weight.grad[1].tolist(), "and of A", got.tolist())
assert not plain.weight.grad[1].any() and got.any()
