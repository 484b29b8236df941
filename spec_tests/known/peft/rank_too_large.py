"""pissa, pissa_niter and olora with r > min(in, out): A and B get another rank than the scaling is made for."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

for init in ("pissa", "pissa_niter_16", "olora"):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=7, target_modules=["0"], init_lora_weights=init)
    )
    layer = model.base_model.model[0]
    print(f"{init}: r is {layer.r['default']}, A is {tuple(layer.lora_A['default'].weight.shape)}")
    assert layer.lora_A["default"].weight.shape[0] == 4
