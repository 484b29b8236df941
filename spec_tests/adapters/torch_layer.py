"""What layers of PyTorch libraries have in common: one module with a weight, a bias, and parameters for A and B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..contract import MESH, Array, Layer, LayerSpec, LayerState
from .peft_style import to_numpy, to_torch


class TorchLayer(Layer):
    """A subclass gives the five below.

    `weight` is as the library stores it: W is turned where the kind is "transposed" or "embedding".
    `factors` are A (r, in) and B (out, r), or of a convolution with a kernel.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        torch.manual_seed(spec.seed)
        self.module = self.make(spec)

    def make(self, spec: LayerSpec) -> nn.Module:
        """The module, which `forward` calls."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        raise NotImplementedError

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        raise NotImplementedError

    def scaling(self) -> float:
        raise NotImplementedError

    # -- what follows from them ----------------------------------------------------------------

    def turned(self, value: Array) -> Array:
        """From the stored orientation to the logical one, and back."""
        return value.T if self.spec.kind in ("transposed", "embedding") else value

    def given(self, x: Array) -> Tensor:
        """Inputs: the indices of an embedding stay integers."""
        return torch.tensor(x) if x.dtype.kind in "iu" else to_torch(x, self.spec.dtype)

    def read(self) -> LayerState:
        A, B = map(to_numpy, self.factors())
        b = None if self.bias() is None else to_numpy(self.bias())
        return LayerState(self.turned(to_numpy(self.weight())), b, A, B.reshape(B.shape[:2]), float(self.scaling()))

    def write(self, A: Array, B: Array) -> None:
        for parameter, value in zip(self.factors(), (A, B), strict=True):
            parameter.data = to_torch(value, self.spec.dtype).reshape(parameter.shape)

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        torch.manual_seed(seed)
        self.module.train(train)
        with torch.no_grad():
            return to_numpy(self.module(self.given(x)))

    def grad(self, x: Array, dy: Array, train: bool = False, seed: int = 0) -> dict[str, Array | None]:
        self.module.train(train)
        given = self.given(x)
        if given.is_floating_point():
            given.requires_grad_()
        A, B = self.factors()
        found: dict[str, Any] = {"x": given, "A": A, "B": B, "W": self.weight(), "b": self.bias()}
        for value in found.values():
            if value is not None:
                value.grad = None
        torch.manual_seed(seed)
        y = self.module(given)
        if y.requires_grad:  # nothing may train where the adapter is off
            (y * to_torch(dy, self.spec.dtype)).sum().backward()
        grads = {k: None if v is None or v.grad is None else to_numpy(v.grad) for k, v in found.items()}
        if grads["W"] is not None:
            grads["W"] = self.turned(grads["W"])
        if grads["B"] is not None and MESH.get(self.spec.kind, 0):
            grads["B"] = grads["B"].reshape(grads["B"].shape[:2])
        return grads

    def trainable(self) -> set[str]:
        A, B = self.factors()
        found = {"A": A, "B": B, "W": self.weight(), "b": self.bias()}
        return {name for name, value in found.items() if value is not None and value.requires_grad}

    def fill(self, module: Any) -> None:
        """Put W and b into a base layer."""
        with torch.no_grad():
            module.weight.copy_(to_torch(self.turned(self.spec.W), self.spec.dtype))
            if self.spec.b is not None:
                module.bias.copy_(to_torch(self.spec.b, self.spec.dtype))
