"""modules_to_save=["head"] copies and trains a module xhead, too."""

from peft import LoraConfig, get_peft_model
from torch import nn

net = nn.Sequential()
for name in ("proj", "head", "xhead"):
    net.add_module(name, nn.Linear(4, 4))
model = get_peft_model(net, LoraConfig(target_modules=["proj"], modules_to_save=["head"]))
trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora" not in name]
print("what trains besides LoRA:", trains)
assert any("xhead" in name for name in trains)
