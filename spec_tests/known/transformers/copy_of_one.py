"""An adapter cannot be set where another one has copies of modules_to_save that it has not."""

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
model.add_adapter(LoraConfig(target_modules=["linear"]), "one")
model.add_adapter(LoraConfig(target_modules=["linear"], modules_to_save=["head"]), "two")
try:
    model.set_adapter("one")
except ValueError as error:
    print("set_adapter('one'):", error)
else:
    raise AssertionError("it can be set")
