"""An embedding with max_norm: merged, its lookup shortens the sum of the weight and the update, without an error."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

base = nn.Embedding(2, 2, max_norm=1.0)
base.weight.data = torch.tensor([[0.5, 0.0], [1.0, 0.0]])
model = get_peft_model(nn.Sequential(base), LoraConfig(r=1, lora_alpha=1, target_modules=["0"])).eval()
layer = model.base_model.model[0]
layer.lora_embedding_A["default"].data = torch.full((1, 2), 0.5)  # no longer than max_norm: it stays as it is
layer.lora_embedding_B["default"].data = torch.ones(2, 1)
x = torch.tensor([0, 1])
before = model(x)
model.merge_adapter()
after = model(x)
print("the vectors before merging:", before.tolist(), "and after:", after.tolist())
assert (after - before).abs().max() > 0.1
assert abs(float(after[1].norm()) - 1) < 1e-3
