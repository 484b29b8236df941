"""enable_adapters after disable_adapters leaves the trained copies of modules_to_save out of use."""

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class Model(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.linear, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.post_init()

    def forward(self, x):
        return self.head(self.linear(x))


model = Model()
model.add_adapter(LoraConfig(target_modules=["linear"], modules_to_save=["head"]))
nn.init.normal_(model.head.modules_to_save["default"].weight)
x = torch.ones(1, 2)
before = model(x)
model.disable_adapters()
model.enable_adapters()
after = model(x)
print("the output before disable_adapters and enable_adapters:", before.tolist(), "and after them:", after.tolist())
assert (before - after).abs().max() > 1e-3
