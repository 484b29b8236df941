"""Small networks that several tests adapt."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_ref import LoraConfig, get_peft_model
from lora_ref.core.layer_types import LoraLayer


class Conv1D(nn.Module):
    """transformers' linear layer of GPT-2: the weight is stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / nx**0.5), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class Stacks(nn.Module):
    """Raw weights of no layer of their own: a matrix and a stack of experts."""

    def __init__(self, matrix: Tensor, stack: Tensor, is_transposed: bool) -> None:
        super().__init__()
        self.matrix, self.stack, self.is_transposed = nn.Parameter(matrix), nn.Parameter(stack), is_transposed

    def forward(self, x: Tensor) -> Tensor:
        per_expert = "ti,eio->eto" if self.is_transposed else "ti,eoi->eto"
        return torch.einsum(per_expert, F.linear(x, self.matrix), self.stack)


class Experts(nn.Module):
    """One raw parameter: a matrix (out, in) of each of n experts, whose outputs are added after a tanh."""

    def __init__(self, n: int, n_out: int, n_in: int) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(n, n_out, n_in))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.einsum("...i,eoi->...eo", x, self.stack)).sum(-2)


class UpAndDown(nn.Module):
    """Two raw parameters: for each of n experts a matrix to `inner` numbers and one back; for n=0 one matrix each.

    Stored (n, out, in), or (n, in, out) with `is_transposed`. The outputs of the experts are added.
    """

    def __init__(self, n: int, width: int, inner: int, is_transposed: bool) -> None:
        super().__init__()
        shapes = ((n, inner, width), (n, width, inner)) if n else ((inner, width), (width, inner))
        if n and is_transposed:
            shapes = shapes[::-1]
        if is_transposed:
            self.is_transposed = True
        self.up, self.down = (nn.Parameter(torch.randn(shape) / 2) for shape in shapes)
        self.transposed = bool(n) and is_transposed

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w if self.transposed else w.mT for w in (self.up, self.down))
        if up.ndim == 2:
            return torch.tanh(x @ up) @ down
        return (torch.tanh(x.unsqueeze(-3) @ up) @ down).sum(-3)


class ScaledEmbedding(nn.Embedding):
    """Gemma's: the rows are multiplied by a constant."""

    embed_scale = 2.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale


def adapt(module: nn.Module, r: int = 2, **options: Any) -> tuple[nn.Module, LoraLayer]:
    """The adapted model around one module, and its layer. A and B are random unless told otherwise."""
    options = {"init_lora_weights": False, "fan_in_fan_out": isinstance(module, Conv1D)} | options
    model = get_peft_model(nn.Sequential(OrderedDict(m=module)), LoraConfig(r=r, target_modules=["m"], **options))
    return model, model.layers()["m"]


def randomise(model: nn.Module, scale: float = 0.5) -> nn.Module:
    """Normal numbers for what is trained, for each factor and for each copy of modules_to_save: no factor is zero."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name or "modules_to_save" in name:
            parameter.data = scale * torch.randn(parameter.shape).to(parameter)
    return model
