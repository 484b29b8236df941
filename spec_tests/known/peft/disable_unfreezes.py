"""disable_adapter makes an adapter train that was loaded to be used."""

import tempfile

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

with tempfile.TemporaryDirectory() as folder:
    get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"])).save_pretrained(folder)
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(2, 2)), folder)
before = [name for name, p in model.named_parameters() if p.requires_grad]
with model.disable_adapter():
    pass
after = [name for name, p in model.named_parameters() if p.requires_grad]
print("trains after loading:", before, "and after disable_adapter:", after)
assert not before and after
