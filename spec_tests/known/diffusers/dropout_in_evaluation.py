"""An adapter that is added to a model in evaluation drops its inputs there."""

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from torch import nn


class Model(ModelMixin, ConfigMixin, PeftAdapterMixin):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x)


model = Model().eval()
model.add_adapter(LoraConfig(r=1, target_modules=["layer"], lora_dropout=0.5, init_lora_weights=False))
outputs = torch.stack([model(torch.ones(1, 8)) for _ in range(20)])
print("model.training is", model.training, "and 20 outputs differ by", float(outputs.std(0).max()))
assert not model.training and outputs.std(0).max() > 1e-3
