"""lora-pytorch's LoRA.from_module, layer by layer: it adapts every layer that it knows, and takes no names.

It has no s: alpha / r is put into A at the start. Its factors are (in, r) and (r, out), of a convolution as torch has
them.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any, ClassVar

import torch
from lora_pytorch import LoRA

from .. import promises
from ..contract import MESH, Array, Implementation, Layer, LayerSpec, LayerState
from .peft_style import base_module, to_numpy, to_torch
from .torch_layer import TorchLayer


class LoraPytorchLayer(TorchLayer):
    def make(self, spec: LayerSpec) -> Any:
        return LoRA.from_module(base_module(spec.kind, spec.W, spec.b, spec.dtype, spec), rank=spec.r)

    def weight(self) -> Any:
        return self.module.module.weight

    def bias(self) -> Any:
        return getattr(self.module.module, "bias", None)

    def factors(self) -> Any:
        lora = self.module.lora_module
        return (lora.in_conv.weight, lora.out_conv.weight) if MESH[self.spec.kind] else (lora.in_proj, lora.out_proj)

    def logical(self, factor: Array) -> Array:
        """A or B from the stored orientation, and back."""
        return factor if MESH[self.spec.kind] else factor.T

    def scaling(self) -> float:
        return 1.0

    def read(self) -> LayerState:
        A, B = (self.logical(to_numpy(factor)) for factor in self.factors())
        b = self.bias()
        b = None if b is None else to_numpy(b)
        return LayerState(self.turned(to_numpy(self.weight())), b, A, B.reshape(B.shape[:2]), 1.0)

    def write(self, A: Array, B: Array) -> None:
        for parameter, value in zip(self.factors(), (A, B), strict=True):
            parameter.data = to_torch(self.logical(value), self.spec.dtype).reshape(parameter.shape)

    def grad(self, x: Array, dy: Array, train: bool = False, seed: int = 0) -> dict[str, Array | None]:
        grads = super().grad(x, dy, train, seed)
        return {k: self.logical(v) if k in "AB" and v is not None else v for k, v in grads.items()}

    def trainable(self) -> set[str]:
        """What `parameters` gives, as an optimiser gets it."""
        trains = {id(parameter) for parameter in self.module.parameters() if parameter.requires_grad}
        A, B = self.factors()
        found = {"A": A, "B": B, "W": self.weight(), "b": self.bias()}
        return {name for name, value in found.items() if id(value) in trains}

    def enable(self, enabled: bool) -> None:
        (self.module.enable_lora if enabled else self.module.disable_lora)()

    def merged_copy(self) -> tuple[Array, Array | None]:
        merged = self.module.merge_lora(inplace=False)
        b = getattr(merged, "bias", None)
        return self.turned(to_numpy(merged.weight)), None if b is None else to_numpy(b)


class LoraPytorch(Implementation):
    name = "lora_pytorch"
    claims = promises.claims("lora_pytorch")
    conventions: ClassVar = {"scaling": "none"}

    def version(self) -> str:
        return f"lora-pytorch {importlib.metadata.version('lora-pytorch')}, torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return LoraPytorchLayer(spec)
