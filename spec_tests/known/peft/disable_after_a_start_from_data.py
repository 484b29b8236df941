"""disable_adapter with corda and lora_ga runs the residual, and not the base model."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

torch.manual_seed(0)
x = torch.randn(12, 6)
for init in ("corda", "lora_ga"):
    net = nn.Sequential(nn.Linear(6, 6))
    before = net(x).detach()
    option = {"corda_config": CordaConfig()} if init == "corda" else {"lora_ga_config": LoraGAConfig()}
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=init, **option)
    if init == "corda":
        preprocess_corda(net, config, run_model=lambda net=net: net(x))
    else:
        preprocess_loraga(net, config, lambda net=net: net(x).square().sum().backward())
    model = get_peft_model(net, config)
    with model.disable_adapter():
        off = float((model(x) - before).abs().max())
    print(f"{init}: with the adapter off the output is off by {off:.2g}")
    assert off > 1e-3
