"""unfuse_lora subtracts the update as it is now: where A or B changed since fuse_lora, W is not restored."""

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


model = Model()
before = model.layer.weight.detach().clone()
model.add_adapter(LoraConfig(target_modules=["layer"]))
model.fuse_lora()
nn.init.ones_(model.layer.lora_B["default"].weight)
model.unfuse_lora()
off = float((model.layer.weight - before).detach().abs().max())
print("the weight after fuse_lora, a change of B, and unfuse_lora is off by", off)
assert off > 1e-2
