"""A second instance of the deviation of Keras, on the torch backend, with Keras and NumPy alone."""

from __future__ import annotations

import keras
import numpy as np


def update(layer: keras.layers.Layer, name: str) -> float:
    """The largest number that A and B of ones add to the weight of a layer that is built."""
    before = keras.ops.convert_to_numpy(getattr(layer, name))
    for factor in (layer.weights[-2], layer.weights[-1]):
        factor.assign(np.ones(factor.shape))
    return float(abs(keras.ops.convert_to_numpy(getattr(layer, name)) - before).max())


def constructor_alpha() -> None:
    dense = keras.layers.Dense(4, lora_rank=3, lora_alpha=12)
    dense.build((None, 3))
    table = keras.layers.Embedding(6, 4, lora_rank=3, lora_alpha=12)
    table.build()
    enabled = keras.layers.Dense(4)
    enabled.build((None, 3))
    enabled.enable_lora(3, lora_alpha=12)
    found = update(dense, "kernel"), update(table, "embeddings"), update(enabled, "kernel")
    print("    lora_alpha / lora_rank is 4 and B A is 3; the updates are", found)
    assert abs(found[0] - 12) > 1 and abs(found[1] - 12) > 1 and abs(found[2] - 12) < 1
