"""lora_alpha = 0 with corda is accepted, and writes NaN into the base weight."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn

torch.manual_seed(0)
x, net = torch.randn(12, 6), nn.Sequential(nn.Linear(6, 6))
config = LoraConfig(r=2, lora_alpha=0, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig())
preprocess_corda(net, config, run_model=lambda: net(x))
W = get_peft_model(net, config).base_model.model[0].base_layer.weight
print("NaN in the base weight:", bool(W.isnan().any()))
assert W.isnan().any()
