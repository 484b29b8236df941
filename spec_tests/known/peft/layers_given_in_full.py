"""layers_to_transform: a target that is a full name is adapted in any layer, and a list at the root has no numbers."""

from peft import LoraConfig, get_peft_model
from torch import nn


def adapted(net, **options):
    model = get_peft_model(net, LoraConfig(r=1, **options))
    return [name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(2))


inside = nn.ModuleDict({"model": Blocks()})
full = adapted(inside, target_modules=["model.layers.1.q"], layers_to_transform=[0])
print("layer 0 is asked for, adapted is", full)
assert full == ["model.layers.1.q"]
try:
    found = adapted(Blocks(), target_modules=["q"], layers_to_transform=[0])
except ValueError as error:
    print("a list at the root:", str(error)[:90])
else:
    raise AssertionError(f"adapted: {found}")
