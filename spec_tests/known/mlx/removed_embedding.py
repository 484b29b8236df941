"""remove_lora_layers leaves the LoRA layers of embeddings in the model."""

import mlx.core as mx
from mlx import nn
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

mx.set_default_device(mx.cpu)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(4, 4), [nn.Linear(4, 4)]

    def __call__(self, x):
        return self.layers[0](self.embed_tokens(x))


model, x = Model(), mx.array([0, 1])
before = model(x)
linear_to_lora_layers(model, -1, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["embed_tokens", "layers.0"]})
for module in (model.embed_tokens, model.layers[0]):
    module.lora_b = mx.ones(module.lora_b.shape)
remove_lora_layers(model)
off = mx.abs(model(x) - before).max().item()
left = [type(module).__name__ for module in (model.embed_tokens, model.layers[0])]
print("left:", left, "and the output is off by", off)
assert off > 1e-3
