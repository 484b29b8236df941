"""delete_adapters of an adapter that is fused leaves its update in the weights for good."""

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from torch import nn


class Model(ModelMixin, ConfigMixin, PeftAdapterMixin):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


model, x = Model(), torch.ones(1, 4)
before = model(x)
for name in ("one", "two"):
    model.add_adapter(LoraConfig(target_modules=["layer"], init_lora_weights=name == "two"), name)
model.set_adapters("one")
model.fuse_lora()
model.delete_adapters("one")
model.unfuse_lora()
off = float((model(x) - before).detach().abs().max())
print("adapters:", list(model.peft_config), "with B = 0; the output is off that of the base model by", off)
assert list(model.peft_config) == ["two"] and off > 1e-2
