"""LoRA written with torch's parametrizations, a class of this project: W + s B A is formed in every forward pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..contract import Array, Implementation, Layer, LayerSpec, LayerState
from .peft_style import base_module, logical, to_numpy, to_torch


class LoRA(nn.Module):
    """weight -> weight + s * B A, in the shape in which the weight is stored."""

    def __init__(self, weight: Tensor, r: int, alpha: float, turned: bool) -> None:
        super().__init__()
        shape = weight.T.shape if turned else weight.shape
        self.turned, self.s, self.on = turned, alpha / r, True
        self.A = nn.Parameter(torch.zeros(r, *shape[1:], dtype=weight.dtype))
        self.B = nn.Parameter(torch.zeros(shape[0], r, dtype=weight.dtype))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        D = self.s * torch.tensordot(self.B, self.A, 1)
        return weight + (D.T if self.turned else D) if self.on else weight


class ParametrizedLayer(Layer):
    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        torch.manual_seed(spec.seed)
        self.module = base_module(spec.kind, spec.W, spec.b, spec.dtype, spec).requires_grad_(False)
        turned = spec.kind in ("transposed", "embedding")
        parametrize.register_parametrization(
            self.module, "weight", LoRA(self.module.weight, spec.r, spec.lora_alpha, turned)
        )
        self.lora: LoRA = self.module.parametrizations["weight"][0]

    def base(self) -> Tensor:
        return self.module.parametrizations["weight"].original

    def read(self) -> LayerState:
        b = None if self.spec.b is None else to_numpy(self.module.bias)
        A, B = to_numpy(self.lora.A), to_numpy(self.lora.B)
        return LayerState(logical(self.spec.kind, self.base()), b, A, B, self.lora.s)

    def write(self, A: Array, B: Array) -> None:
        self.lora.A.data, self.lora.B.data = to_torch(A, self.spec.dtype), to_torch(B, self.spec.dtype)

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        with torch.no_grad():
            return to_numpy(self.module(torch.tensor(x) if x.dtype.kind == "i" else to_torch(x, self.spec.dtype)))

    def enable(self, enabled: bool) -> None:
        self.lora.on = enabled

    def grad(self, x: Array, dy: Array, train: bool = False, seed: int = 0) -> dict[str, Array | None]:
        self.module.zero_grad()
        given = torch.tensor(x) if x.dtype.kind == "i" else to_torch(x, self.spec.dtype).requires_grad_()
        (self.module(given) * to_torch(dy, self.spec.dtype)).sum().backward()
        found = {
            "x": given,
            "A": self.lora.A,
            "B": self.lora.B,
            "W": self.base(),
            "b": getattr(self.module, "bias", None),
        }
        return {k: None if v is None or v.grad is None else to_numpy(v.grad) for k, v in found.items()}

    def trainable(self) -> set[str]:
        found = {"A": self.lora.A, "B": self.lora.B, "W": self.base(), "b": getattr(self.module, "bias", None)}
        return {name for name, value in found.items() if value is not None and value.requires_grad}


class Parametrized(Implementation):
    name = "parametrized"
    claims = frozenset(
        [
            "linear",
            "transposed",
            "embedding",
            "padding_idx",
            "conv1d",
            "conv2d",
            "conv3d",
            "alpha",
            "large_r",
            "unbatched",
            "float64",
            "float32",
            "write",
            "grad",
            "trainable",
            "disable",
        ]
    )

    def version(self) -> str:
        return f"torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return ParametrizedLayer(spec)
