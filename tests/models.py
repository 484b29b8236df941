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
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Stacks(nn.Module):
    """Raw weights of no layer of their own: a matrix and a stack of experts."""

    def __init__(self, matrix: Tensor, stack: Tensor, is_transposed: bool) -> None:
        super().__init__()
        self.matrix, self.stack, self.is_transposed = nn.Parameter(matrix), nn.Parameter(stack), is_transposed

    def forward(self, x: Tensor) -> Tensor:
        per_expert = "ti,eio->eto" if self.is_transposed else "ti,eoi->eto"
        return torch.einsum(per_expert, F.linear(x, self.matrix), self.stack)


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
