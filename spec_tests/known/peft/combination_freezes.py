"""add_weighted_adapter freezes every parameter whose name contains the new adapter's: "b" is in lora_embedding_B."""

from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0", "1"]))


def trains():
    return sum(parameter.requires_grad for name, parameter in model.named_parameters() if "default" in name)


before = trains()
model.add_weighted_adapter(["default"], [1.0], "b", combination_type="cat")
print(f"tensors of the active adapter that train: {before} before, {trains()} after")
assert trains() < before
