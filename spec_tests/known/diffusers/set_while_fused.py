"""After fuse_lora, set_adapters leaves the fused adapter in the weights, and what it sets does not act."""

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
for name in ("one", "two"):
    model.add_adapter(LoraConfig(target_modules=["layer"], init_lora_weights=False), name)
outputs = {}
for name in ("one", "two"):
    model.set_adapters(name)
    outputs[name] = model(x)
model.set_adapters("one")
model.fuse_lora()
model.set_adapters("two")
off = {name: float((model(x) - y).detach().abs().max()) for name, y in outputs.items()}
print("active:", model.active_adapters(), "and the output is off that of each adapter alone by", off)
assert off["two"] > 1000 * off["one"]
