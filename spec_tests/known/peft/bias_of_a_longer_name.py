"""bias="all" trains what is called "bias" alone; microsoft/LoRA trains each parameter that has it in its name."""

import torch
from peft import LoraConfig, get_peft_model

net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GRU(4, 3), torch.nn.MultiheadAttention(4, 2))
model = get_peft_model(net, LoraConfig(target_modules=["0"], bias="all"))
biases = {name: p.requires_grad for name, p in model.named_parameters() if "bias" in name.rpartition(".")[2]}
print("the biases that do not train:", [name for name, trains in biases.items() if not trains])
assert [name for name, trains in biases.items() if not trains] == [
    "base_model.model.1.bias_ih_l0",
    "base_model.model.1.bias_hh_l0",
    "base_model.model.2.in_proj_bias",
]
