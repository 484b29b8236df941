"""A dilated convolution: the branch is not dilated, so that its output has another size."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for convolution, dims in ((nn.Conv1d, 1), (nn.Conv2d, 2), (nn.Conv3d, 3)):
    model = get_peft_model(nn.Sequential(convolution(2, 2, 3, dilation=2)), LoraConfig(target_modules=["0"]))
    try:
        model(torch.ones(1, 2, *[7] * dims))
    except RuntimeError as error:
        print(f"{convolution.__name__}: {error}")
    else:
        raise AssertionError("it works")
