"""out_proj of torch's MultiheadAttention as a target: it is adapted, and nothing acts until it is merged."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
attention = nn.MultiheadAttention(4, 1, batch_first=True)
for parameter in attention.parameters():
    parameter.data = torch.randint(-2, 3, parameter.shape).float()
x = torch.ones(1, 2, 4)  # two equal tokens have the weight 1/2 each: nothing is rounded


def output() -> torch.Tensor:
    return attention(x, x, x, need_weights=False)[0]


base = output()
config = LoraConfig(r=2, target_modules=["out_proj"], init_lora_weights=False)  # B is not zero
model = get_peft_model(nn.ModuleDict({"attention": attention}), config)
trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
print(f"adapted and trained: {trained}")
assert len(trained) == 2

print(f"the adapter changes the output by {(output() - base).abs().max().item():g}")
assert torch.equal(output(), base)

model.merge_adapter()
print(f"merged, by {(output() - base).abs().max().item():.2g}")
assert (output() - base).abs().max() > 1e-3
