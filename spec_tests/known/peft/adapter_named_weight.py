"""With a second adapter that is called "weight", the file of the first adapter has no tensors."""

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

config = LoraConfig(target_modules=["proj"])
model = get_peft_model(nn.ModuleDict({"proj": nn.Linear(4, 4)}), config)
alone = get_peft_model_state_dict(model, adapter_name="default")
model.add_adapter("weight", config)
beside = get_peft_model_state_dict(model, adapter_name="default")
print("the tensors of the adapter default:", sorted(alone))
print("the same beside an adapter called weight:", sorted(beside))
assert len(alone) == 2 and not beside
