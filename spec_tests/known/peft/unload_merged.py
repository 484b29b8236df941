"""unload() of a merged model leaves the update in the weights of what it returns as the base model."""

from peft import LoraConfig, get_peft_model
from torch import nn

net = nn.Sequential(nn.Linear(4, 4))
before = net[0].weight.detach().clone()
model = get_peft_model(net, LoraConfig(target_modules=["0"], init_lora_weights=False))
model.merge_adapter()
off = float((model.unload()[0].weight - before).abs().max())
print(f"the weight after merge_adapter() and unload() is off by {off:.2g}")
assert off > 1e-3
