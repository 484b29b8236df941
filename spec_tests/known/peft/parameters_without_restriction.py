"""exclude_modules does not restrict target_parameters."""

from peft import LoraConfig, get_peft_model
from torch import nn

net = nn.ModuleDict(
    {"model": nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(2))})}
)
options = {"target_parameters": ["q.weight"], "exclude_modules": ["layers.0.q"]}
model = get_peft_model(net, LoraConfig(r=1, target_modules=[], **options))
adapted = [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")]
print("adapted:", adapted)
assert adapted == ["model.layers.0.q", "model.layers.1.q"]
