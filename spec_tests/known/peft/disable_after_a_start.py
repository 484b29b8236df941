"""disable_adapter with pissa, pissa_niter and olora runs the residual, and not the base model."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

x = torch.ones(1, 4)
for init in ("pissa", "pissa_niter_16", "olora"):
    net = nn.Sequential(nn.Linear(4, 4))
    before = net(x)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
    with model.disable_adapter():
        off = float((model(x) - before).abs().max())
    print(f"{init}: with the adapter off the output is off by {off:.2g}")
    assert off > 1e-3
