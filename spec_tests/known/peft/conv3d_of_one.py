"""A 3-dimensional convolution with a kernel of 1 x 1 x 1 cannot be merged."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Conv3d(2, 2, 1)), LoraConfig(r=1, target_modules=["0"])).eval()
model(torch.ones(1, 2, 1, 1, 1))
try:
    model.merge_adapter()
except RuntimeError as error:
    print("merging raises RuntimeError:", error)
else:
    raise AssertionError("it is merged")
