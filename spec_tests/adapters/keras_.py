"""Keras' enable_lora of Dense, Embedding and Conv1D to Conv3D, on any of its backends (KERAS_BACKEND)."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

from .. import promises
from ..contract import MESH, Array, Implementation, Layer, LayerSpec, LayerState


class KerasLayer(Layer):
    """Keras stores a kernel as (*kernel, in, out), and takes (batch, *size, in)."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.dims = spec, MESH[spec.kind]
        keras.utils.set_random_seed(spec.seed)
        out, n_in = spec.W.shape[:2]
        if spec.kind == "embedding":
            self.module = keras.layers.Embedding(n_in, out)
            self.module.build()
            weights = [spec.W.T]
        elif spec.kind == "linear":
            self.module = keras.layers.Dense(out, use_bias=spec.b is not None)
            self.module.build((None, n_in))
            weights = [spec.W.T]
        else:
            make = {1: keras.layers.Conv1D, 2: keras.layers.Conv2D, 3: keras.layers.Conv3D}[self.dims]
            options = {"strides": spec.stride, "dilation_rate": spec.dilation, "use_bias": spec.b is not None}
            self.module = make(out, spec.W.shape[2:], data_format="channels_last", **options)
            self.module.build((None, *[16] * self.dims, n_in))
            weights = [np.moveaxis(spec.W, (0, 1), (-1, -2))]
        self.module.set_weights(weights + ([] if spec.b is None else [spec.b]))
        self.module.enable_lora(spec.r, lora_alpha=spec.lora_alpha)
        m, embedding = self.module, spec.kind == "embedding"
        self.A = m.lora_embeddings_a if embedding else m.lora_kernel_a
        self.B = m.lora_embeddings_b if embedding else m.lora_kernel_b
        self.W = m._embeddings if embedding else m._kernel

    def read(self) -> LayerState:
        W, A, B = (keras.ops.convert_to_numpy(v.value).astype(np.float64) for v in (self.W, self.A, self.B))
        W, A = (np.moveaxis(v, (-1, -2), (0, 1)) if self.dims else v.T for v in (W, A))
        b = None if self.spec.b is None else keras.ops.convert_to_numpy(self.module.bias.value).astype(np.float64)
        return LayerState(W, b, A, B.T, self.module.lora_alpha / self.module.lora_rank)

    def write(self, A: Array, B: Array) -> None:
        self.A.assign(np.moveaxis(A, (0, 1), (-1, -2)) if self.dims else A.T)
        self.B.assign(B.T)

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        if self.dims:
            p = self.spec.padding
            x = np.moveaxis(np.pad(x, [(0, 0), (0, 0)] + [(p, p)] * self.dims), 1, -1)
        given = x if x.dtype.kind == "i" else x.astype(np.float32)
        y = keras.ops.convert_to_numpy(self.module(given, training=train) if self.dims else self.module(given))
        return (np.moveaxis(y, -1, 1) if self.dims else y).astype(np.float64)


class Keras(Implementation):
    name = "keras"
    claims = promises.claims("keras")

    def version(self) -> str:
        return f"keras {keras.__version__}, {keras.backend.backend()}"

    def layer(self, spec: LayerSpec) -> Layer:
        return KerasLayer(spec)
