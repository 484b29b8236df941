"""A new adapter leaves the copies of modules_to_save of those before training, and setting it does not freeze them."""

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class Model(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.linear, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.post_init()


model = Model()
for name in ("one", "two"):
    model.add_adapter(LoraConfig(target_modules=["linear"], modules_to_save=["head"]), name)
model.set_adapter("two")
trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
print("with the adapter two set, this trains:", trains)
assert "head.modules_to_save.one.weight" in trains
assert not any("lora" in name and "one" in name for name in trains)
