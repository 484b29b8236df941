"""scale_layer and unscale_layer do nothing on an embedding."""

from peft import LoraConfig, get_peft_model
from torch import nn

for layer in (nn.Linear(4, 4), nn.Embedding(4, 4)):
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    adapted = model.base_model.model[0]
    adapted.scale_layer(4.0)
    print(f"{type(layer).__name__}: scaling after scale_layer(4.0) is {adapted.scaling['default']}")
assert adapted.scaling["default"] == 1.0
