"""An adapter that is added to a model in evaluation drops its inputs there."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=1, target_modules=["0"])).eval()
model.add_adapter("b", LoraConfig(r=1, target_modules=["0"], lora_dropout=0.5, init_lora_weights=False))
model.set_adapter("b")
outputs = torch.stack([model(torch.ones(8)) for _ in range(20)])
print("model.training is", model.training, "and 20 outputs differ by", float(outputs.std(0).max()))
assert not model.training and outputs.std(0).max() > 1e-3
