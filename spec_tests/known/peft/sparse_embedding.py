"""An embedding with sparse gradients: the backward pass of the adapter fails."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Embedding(3, 2, sparse=True)), LoraConfig(r=1, target_modules=["0"]))
y = model(torch.tensor([0, 1]))
try:
    y.sum().backward()
except RuntimeError as error:
    print("backward raises RuntimeError:", str(error)[:80])
else:
    raise AssertionError("the gradient is computed")
