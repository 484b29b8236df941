"""Dense and Embedding take lora_alpha in their constructor and forget it when they are built: s is 1."""

import os

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np

layers = {
    "Dense": keras.layers.Dense(4, lora_rank=2, lora_alpha=8),
    "EinsumDense": keras.layers.EinsumDense("bx,xy->by", 4, lora_rank=2, lora_alpha=8),
    "Embedding": keras.layers.Embedding(4, 4, lora_rank=2, lora_alpha=8),
}
x = np.eye(4, dtype="float32")
found = {}
for name, layer in layers.items():
    given = np.arange(4) if name == "Embedding" else x
    before = keras.ops.convert_to_numpy(layer(given))
    a, b = layer.weights[-2:]
    a.assign(np.ones(a.shape))
    b.assign(np.ones(b.shape))
    found[name] = float(abs(keras.ops.convert_to_numpy(layer(given)) - before).max())
print("lora_alpha / lora_rank is 4 and B A is 2 everywhere; each update is", found)
off = {name: abs(update - 8) for name, update in found.items()}
assert off["Dense"] > 1 and off["Embedding"] > 1 and off["EinsumDense"] < 1
