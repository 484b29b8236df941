"""A model that has a module called base_layer cannot be merged and unloaded."""

from peft import LoraConfig, get_peft_model
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.base_layer = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.base_layer(self.first(x))


model = get_peft_model(Net(), LoraConfig(r=1, target_modules=["first"]))
try:
    model.merge_and_unload()
except AttributeError as error:
    print("merge_and_unload raises AttributeError:", error)
else:
    raise AssertionError("it is unloaded")
