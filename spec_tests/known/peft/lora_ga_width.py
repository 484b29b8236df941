"""lora_ga multiplies B alone by out^(1/4) / sqrt(gamma); in the paper's algorithm 1 that number is in A and in B."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

lengths = {}
for out in (4, 64):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, out)), torch.eye(6)
    dy = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0, 0.0]))[:, :4] @ torch.eye(4, out)
    config = LoraConfig(r=1, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    preprocess_loraga(net, config, lambda net=net, x=x, dy=dy: (net(x) * dy).sum().backward())
    layer = get_peft_model(net, config).base_model.model[0]
    lengths[out] = layer.lora_A["default"].weight.norm().item(), layer.lora_B["default"].weight.norm().item()
    print(f"out={out}: the length of A {lengths[out][0]:.4f}, of B {lengths[out][1]:.4f}")
(a4, b4), (a64, b64) = lengths[4], lengths[64]
assert abs(b64 / b4 - 2) < 1e-3 and abs(a64 / a4 - 1) < 1e-3
