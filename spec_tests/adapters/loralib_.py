"""microsoft/LoRA's loralib: Linear, Embedding, and MergedLinear for fused layers.

Its Conv2d factorises the weight another way, kernel by kernel, and is judged by its update. Its Conv1d and Conv3d are
not claimed: its README does not name them.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import loralib
import numpy as np
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
            options |= {"bias": spec.b is not None}
            if spec.parts:
                made = loralib.MergedLinear(n_in, out, **options, enable_lora=list(spec.parts))
            else:
                made = loralib.Linear(n_in, out, **options)
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
        return LayerState(W, b, to_numpy(m.lora_A), self.padded(to_numpy(m.lora_B)), float(m.scaling))

    def parts(self) -> list[tuple[slice, slice, slice]]:
        """Of each adapted part of a fused layer: its rows in loralib's B, those in the contract's, and its columns."""
        size, r = len(self.spec.W) // len(self.spec.parts), self.spec.r
        adapted = [part for part, here in enumerate(self.spec.parts) if here]
        return [
            (slice(i * size, (i + 1) * size), slice(part * size, (part + 1) * size), slice(i * r, (i + 1) * r))
            for i, part in enumerate(adapted)
        ]

    def padded(self, B: Array) -> Array:
        """loralib's B of a fused layer, (out of the adapted parts, r), as the contract has it."""
        if not self.spec.parts:
            return B
        full = np.zeros((len(self.spec.W), self.spec.r * sum(self.spec.parts)))
        for theirs, rows, columns in self.parts():
            full[rows, columns] = B[theirs]
        return full

    def write(self, A: Array, B: Array) -> None:
        self.module.lora_A.data = to_torch(A, self.spec.dtype)
        if self.spec.parts:
            B = np.concatenate([B[rows, columns] for _, rows, columns in self.parts()])
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
        grads = {k: None if v is None or v.grad is None else to_numpy(v.grad) for k, v in found.items()}
        return {k: self.padded(v) if k == "B" and v is not None else v for k, v in grads.items()}

    def trainable(self) -> set[str]:
        m = self.module
        found = {"A": m.lora_A, "B": m.lora_B, "W": m.weight, "b": getattr(m, "bias", None)}
        return {name for name, value in found.items() if value is not None and value.requires_grad}


class LoralibConv2d(LoralibLayer):
    """loralib.Conv2d: A (r k, in k) and B (out k, r k) for a kernel of k x k, so it is judged by its update alone."""

    def __init__(self, spec: LayerSpec) -> None:
        self.spec, (out, n_in, kernel, _) = spec, spec.W.shape
        torch.manual_seed(spec.seed)
        options: dict[str, Any] = {"r": spec.r, "lora_alpha": spec.lora_alpha, "merge_weights": False}
        options |= {"stride": spec.stride, "padding": spec.padding, "bias": spec.b is not None}
        self.module = loralib.Conv2d(n_in, out, kernel, **options)
        loralib.mark_only_lora_as_trainable(self.module)
        with torch.no_grad():
            self.module.conv.weight.copy_(to_torch(spec.W, spec.dtype))
            if spec.b is not None:
                self.module.conv.bias.copy_(to_torch(spec.b, spec.dtype))

    def base_weight(self) -> Array:
        return to_numpy(self.module.conv.weight)

    def update(self) -> Array:
        m = self.module
        return to_numpy((m.lora_B @ m.lora_A).view(m.conv.weight.shape) * m.scaling)

    def scatter(self, seed: int) -> None:
        torch.manual_seed(seed)
        for factor in (self.module.lora_A, self.module.lora_B):
            torch.nn.init.normal_(factor)


class Loralib(Implementation):
    name = "loralib"
    claims = promises.claims("loralib")

    def version(self) -> str:
        return f"loralib {importlib.metadata.version('loralib')}, torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return LoralibConv2d(spec) if spec.kind == "conv2d" else LoralibLayer(spec)
