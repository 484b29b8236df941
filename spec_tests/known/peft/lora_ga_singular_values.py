"""lora_ga multiplies B by the singular values of the gradient; the paper's B is singular vectors times one number."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

torch.manual_seed(0)
x, dy, net = torch.randn(12, 6), torch.randn(12, 6), nn.Sequential(nn.Linear(6, 6))
config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(scale="unit"))
preprocess_loraga(net, config, lambda: (net(x) * dy).sum().backward())
layer = get_peft_model(net, config).base_model.model[0]
A, B = layer.lora_A["default"].weight.norm(dim=1), layer.lora_B["default"].weight.norm(dim=0)
print("the singular values of the gradient:", torch.linalg.svdvals(dy.T @ x)[:4].tolist())
print("scale='unit', no scaling: the lengths of A's rows:", A.tolist(), "and of B's columns:", B.tolist())
assert abs(A[0] / A[1] - 1) < 1e-3 and abs(B[0] / B[1] - 1) > 1e-2
