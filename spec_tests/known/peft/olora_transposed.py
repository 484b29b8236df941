"""olora on transformers' Conv1D, which stores its weight transposed: the model does not start as the base."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

torch.manual_seed(0)
x = torch.randn(3, 4)
for layer in (nn.Linear(4, 4), Conv1D(4, 4)):
    nn.init.normal_(layer.weight)
    before = layer(x)
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="olora", fan_in_fan_out=isinstance(layer, Conv1D))
    after = get_peft_model(nn.Sequential(layer), config)(x)
    off = float((after - before).abs().max())
    print(f"{type(layer).__name__}: the output at the start is off by {off:.2g}")
assert off > 0.1
