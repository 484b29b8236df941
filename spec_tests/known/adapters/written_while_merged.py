"""reset_adapter subtracts the update as it is now: where A or B changed since merge_adapter, W is not restored."""

import adapters
from torch import nn
from transformers import BertConfig, BertModel

config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
model = BertModel(config)
adapters.init(model)
model.add_adapter("one", config="lora")
layer = model.encoder.layer[0].attention.self.query
before = layer.weight.detach().clone()
model.merge_adapter("one")
nn.init.ones_(layer.loras["one"].lora_B)
model.reset_adapter()
off = (layer.weight - before).abs().max().item()
print("the weight after merge_adapter, a change of B, and reset_adapter is off by", off)
assert off > 0.1
