"""target_modules="all-linear" becomes a list of endings, and adapts what is no linear layer, or fails on it."""

from peft import LoraConfig, get_peft_model
from torch import nn


class Net(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.model = nn.Module()
        self.model.q_proj = other


model = get_peft_model(Net(nn.Embedding(4, 4)), LoraConfig(target_modules="all-linear"))
print("all-linear adapts an embedding:", len(model.base_model.model.model.q_proj.lora_embedding_A) == 1)
assert len(model.base_model.model.model.q_proj.lora_embedding_A) == 1
excluding = LoraConfig(target_modules="all-linear", exclude_modules=["nothing"])
model = get_peft_model(Net(nn.Embedding(4, 4)), excluding)
assert len(model.base_model.model.model.q_proj.lora_embedding_A) == 1
try:
    get_peft_model(Net(nn.LayerNorm(4)), LoraConfig(target_modules="all-linear"))
except ValueError as error:
    print("and with a LayerNorm of that name:", error)
else:
    raise AssertionError("it works")
