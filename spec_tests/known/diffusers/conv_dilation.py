"""A convolution with dilation cannot be used with an adapter."""

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from torch import nn


class Model(ModelMixin, ConfigMixin, PeftAdapterMixin):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 2, dilation=2)

    def forward(self, x):
        return self.layer(x)


model = Model()
model(torch.ones(1, 2, 4, 4))
model.add_adapter(LoraConfig(target_modules=["layer"]))
try:
    model(torch.ones(1, 2, 4, 4))
except RuntimeError as error:
    print("the forward pass:", error)
else:
    raise AssertionError("it works")
