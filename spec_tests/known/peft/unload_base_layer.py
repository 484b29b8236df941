"""A model with a module that is called base_layer cannot be unloaded, though the module is no part of an adapter."""

from peft import LoraConfig, get_peft_model
from torch import nn

block = nn.Module()
block.base_layer, block.proj = nn.Linear(4, 4), nn.Linear(4, 4)
model = get_peft_model(nn.ModuleDict({"block": block}), LoraConfig(target_modules=["proj"]))
found = ""
try:
    model.merge_and_unload()
except AttributeError as error:
    found = str(error)
print("merge_and_unload:", found)
assert "has no attribute 'merge'" in found
