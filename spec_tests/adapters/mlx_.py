"""mlx-lm's LoRALinear and LoRAEmbedding, on the CPU. They take s itself ("scale"), so it is lora_alpha / r here."""

from __future__ import annotations

import importlib.metadata
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from .. import promises
from ..contract import Array, Implementation, Layer, LayerSpec, LayerState

mx.set_default_device(mx.cpu)


def to_numpy(value: Any) -> Array:
    return np.array(value.astype(mx.float32)).astype(np.float64)


class MlxLayer(Layer):
    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.dtype = spec, getattr(mx, spec.dtype)
        mx.random.seed(spec.seed)
        out, n_in = spec.W.shape
        options = {"r": spec.r, "dropout": spec.lora_dropout, "scale": spec.lora_alpha / spec.r}
        if spec.kind == "embedding":
            base = nn.Embedding(n_in, out)
            base.weight = mx.array(spec.W.T).astype(self.dtype)
            self.module = LoRAEmbedding.from_base(base, **options)
        else:
            base = nn.Linear(n_in, out, bias=spec.b is not None)
            base.weight = mx.array(spec.W).astype(self.dtype)
            if spec.b is not None:
                base.bias = mx.array(spec.b).astype(self.dtype)
            self.module = LoRALinear.from_base(base, **options)

    def base(self) -> Any:
        return self.module.embedding if self.spec.kind == "embedding" else self.module.linear

    def read(self) -> LayerState:
        W = to_numpy(self.base().weight)
        b = None if self.spec.b is None else to_numpy(self.base().bias)
        A, B = to_numpy(self.module.lora_a).T, to_numpy(self.module.lora_b).T
        return LayerState(W.T if self.spec.kind == "embedding" else W, b, A, B, float(self.module.scale))

    def write(self, A: Array, B: Array) -> None:
        self.module.lora_a, self.module.lora_b = (mx.array(np.ascontiguousarray(v.T), dtype=mx.float32) for v in (A, B))

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        mx.random.seed(seed)
        self.module.train(train)
        given = mx.array(x) if x.dtype.kind == "i" else mx.array(x).astype(self.dtype)
        return to_numpy(self.module(given))

    def merged_copy(self) -> tuple[Array, Array | None]:
        made = self.module.fuse()
        W = to_numpy(made.weight)
        return W.T if self.spec.kind == "embedding" else W, None if self.spec.b is None else to_numpy(made.bias)


class Mlx(Implementation):
    name = "mlx"
    claims = promises.claims("mlx")
    conventions: ClassVar = {"zero_factor_of_embedding": "B", "embedding_dropout": True}

    def version(self) -> str:
        return f"mlx-lm {importlib.metadata.version('mlx-lm')}, mlx {importlib.metadata.version('mlx')}"

    def layer(self, spec: LayerSpec) -> Layer:
        return MlxLayer(spec)
