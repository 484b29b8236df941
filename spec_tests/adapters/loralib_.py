"""microsoft/LoRA's loralib. Its convolutions factorise the weight another way, kernel by kernel: not claimed."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import loralib
import torch

from .. import promises
from ..contract import Array, Implementation, Layer, LayerSpec, LayerState
from .peft_style import to_numpy, to_torch


class LoralibLayer(Layer):
    """merge_weights is False, so that train() and eval() do not merge, until a merge is asked for."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, (out, n_in) = spec, spec.W.shape
        torch.manual_seed(spec.seed)
        options: dict[str, Any] = {"r": spec.r, "lora_alpha": spec.lora_alpha, "merge_weights": False}
        dtype = getattr(torch, spec.dtype)
        if spec.kind == "embedding":
            made = loralib.Embedding(n_in, out, **options, padding_idx=spec.padding_idx)
        else:
            options |= {"lora_dropout": spec.lora_dropout, "fan_in_fan_out": spec.kind == "transposed"}
            made = loralib.Linear(n_in, out, **options, bias=spec.b is not None)
        self.module = made.to(dtype)
        loralib.mark_only_lora_as_trainable(self.module)
        with torch.no_grad():
            made.weight.copy_(to_torch(spec.W.T if self.turned else spec.W, spec.dtype))
            if spec.b is not None:
                made.bias.copy_(to_torch(spec.b, spec.dtype))

    @property
    def turned(self) -> bool:
        return self.spec.kind in ("transposed", "embedding")

    def read(self) -> LayerState:
        m = self.module
        W = to_numpy(m.weight.T if self.turned else m.weight)
        b = to_numpy(m.bias) if self.spec.b is not None else None
        return LayerState(W, b, to_numpy(m.lora_A), to_numpy(m.lora_B), float(m.scaling))

    def write(self, A: Array, B: Array) -> None:
        self.module.lora_A.data = to_torch(A, self.spec.dtype)
        self.module.lora_B.data = to_torch(B, self.spec.dtype)

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        torch.manual_seed(seed)
        if not self.module.merged:
            self.module.train(train)
        with torch.no_grad():
            return to_numpy(self.module(self._tensor(x)))

    def _tensor(self, x: Array) -> torch.Tensor:
        return torch.tensor(x) if x.dtype.kind == "i" else to_torch(x, self.spec.dtype)

    def merge(self, safe: bool = False) -> None:
        self.module.merge_weights = True
        self.module.eval()

    def unmerge(self) -> None:
        self.module.train()
        self.module.merge_weights = False

    def grad(self, x: Array, dy: Array, train: bool = False, seed: int = 0) -> dict[str, Array | None]:
        m = self.module
        m.zero_grad()
        if not m.merged:
            m.train(train)
        given = self._tensor(x)
        torch.manual_seed(seed)
        if given.is_floating_point():
            given.requires_grad_()
        (m(given) * to_torch(dy, self.spec.dtype)).sum().backward()
        found = {"x": given, "A": m.lora_A, "B": m.lora_B, "W": m.weight, "b": getattr(m, "bias", None)}
        return {k: None if v is None or v.grad is None else to_numpy(v.grad) for k, v in found.items()}

    def trainable(self) -> set[str]:
        m = self.module
        found = {"A": m.lora_A, "B": m.lora_B, "W": m.weight, "b": getattr(m, "bias", None)}
        return {name for name, value in found.items() if value is not None and value.requires_grad}


class Loralib(Implementation):
    name = "loralib"
    claims = promises.claims("loralib")

    def version(self) -> str:
        return f"loralib {importlib.metadata.version('loralib')}, torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return LoralibLayer(spec)
