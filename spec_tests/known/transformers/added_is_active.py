"""add_adapter makes the new adapter active and the one before not; its documentation says that it is not activated."""

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


class Model(PreTrainedModel):
    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.linear = nn.Linear(2, 2)
        self.post_init()


model = Model()
model.add_adapter(LoraConfig(target_modules=["linear"]), "one")
model.set_adapter("one")
model.add_adapter(LoraConfig(target_modules=["linear"]), "two")
trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
print("active after add_adapter:", model.active_adapters(), "and this trains:", trains)
assert "is not automatically activated" in " ".join(PreTrainedModel.add_adapter.__doc__.split())
assert model.active_adapters() == ["two"]
