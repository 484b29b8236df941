"""A and B change while the adapter is merged: unmerging subtracts another update than was added."""

from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
layer = model.base_model.model[0]
before = layer.base_layer.weight.detach().clone()
model.merge_adapter()
layer.lora_B["default"].weight.data *= 2
model.unmerge_adapter()
off = float((layer.base_layer.weight - before).abs().max())
print("after unmerging the base weight is off by", round(off, 3))
assert off > 1e-3
