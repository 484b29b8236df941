"""onfly_restore on the CPU restores nothing: what onfly_merge keeps is the merged weight itself, and no copy."""

from lycoris.modules.locon import LoConModule
from torch import nn

layer = nn.Linear(4, 4)
before = layer.weight.detach().clone()
lora = LoConModule("lora", layer, 1.0, 2, 2.0)
nn.init.normal_(lora.lora_up.weight)
lora.onfly_merge()
lora.onfly_restore()
off = float((layer.weight.detach() - before).abs().max())
print(f"the weight after onfly_merge() and onfly_restore() is off by {off:.2g}")
assert off > 1e-3
