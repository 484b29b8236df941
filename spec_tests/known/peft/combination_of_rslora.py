"""add_weighted_adapter of one adapter with the weight 1 should change nothing; with use_rslora it scales the update."""

from peft import LoraConfig, get_peft_model
from torch import nn

config = LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
model.add_weighted_adapter(["default"], [1.0], "new", combination_type="cat")
layer = model.base_model.model[0]
ratio = float((layer.get_delta_weight("new") / layer.get_delta_weight("default")).median())
print(f"the update of the combination is {ratio:.3g} times the adapter's")
assert abs(ratio - 1) > 0.1
