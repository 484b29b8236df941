"""An adapter named "a": saving the adapter "default" leaves out every module whose path has a part "a"."""

import tempfile

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

net = nn.ModuleDict({"a": nn.ModuleDict({"up": nn.Linear(4, 4)}), "b": nn.ModuleDict({"up": nn.Linear(4, 4)})})
model = get_peft_model(net, LoraConfig(target_modules=["up"]))
model.add_adapter("a", LoraConfig(target_modules=["up"]))
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    keys = sorted(load_file(f"{folder}/adapter_model.safetensors"))
print("keys of the adapter default:", keys)
assert not any("model.a.up" in key for key in keys)
