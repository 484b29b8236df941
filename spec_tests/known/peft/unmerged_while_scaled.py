"""A merged adapter is unmerged inside a context of scaling: another update is subtracted than was added."""

from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from torch import nn

base = nn.Sequential(nn.Linear(2, 2))
model = get_peft_model(base, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
W = model.base_model.model[0].base_layer.weight
before = W.detach().clone()
model.merge_adapter()
with rescale_adapter_scale(model, 4.0):
    model.unmerge_adapter()
off = float((W - before).abs().max())
print("after unmerging the base weight is off by", round(off, 3))
assert off > 1e-3
