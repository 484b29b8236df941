"""linear1 and linear2 of torch's TransformerEncoderLayer: in evaluation without gradients their adapters do not act."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, 0.0, batch_first=True))
config = LoraConfig(r=2, target_modules=["linear1", "linear2"], init_lora_weights=False)  # B is not zero
model = get_peft_model(net, config)
x = torch.randn(3, 2, 4)
with torch.no_grad():
    training = model.train()(x)
    evaluation = model.eval()(x)
    with model.disable_adapter():
        base = model(x)
print(f"in training the adapters change the output by {(training - base).abs().max().item():.2g}")
print(f"in evaluation by {(evaluation - base).abs().max().item():.2g}")
assert (training - base).abs().max() > 0.01
assert torch.equal(evaluation, base)
