"""adapter_names of a wrong length is refused, and stays: the model refuses a batch without a list."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"])).eval()
x = torch.ones(3, 4)
model(x)  # fine
try:
    model(torch.ones(2, 4), adapter_names=["default"])
except ValueError as error:
    print("refused, rightly:", error)
try:
    model(x)
except ValueError as error:
    print("and afterwards, without adapter_names:", error)
else:
    raise AssertionError("it recovers")
