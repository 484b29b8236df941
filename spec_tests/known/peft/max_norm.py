"""An embedding with max_norm: the branch shortens the vectors of A in place."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), LoraConfig(r=2, target_modules=["0"])).eval()
A = model.base_model.model[0].lora_embedding_A["default"]
A.data = torch.tensor([[3.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
model(torch.tensor([0]))
print("a column of A was [3, 4]; after a forward it is", A.data[:, 0].tolist())
assert A.data[:, 0].norm() < 1.01
