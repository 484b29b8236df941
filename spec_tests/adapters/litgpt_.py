"""litgpt's LoRALinear. It merges, and cannot take a merge out again."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from litgpt.lora import LoRALinear, mark_only_lora_as_trainable

from .. import promises
from ..contract import Implementation, Layer, LayerSpec
from .torch_layer import TorchLayer


class LitgptLayer(TorchLayer):
    def make(self, spec: LayerSpec) -> Any:
        out, n_in = spec.W.shape
        options = {
            "r": spec.r,
            "lora_alpha": spec.lora_alpha,
            "lora_dropout": spec.lora_dropout,
            "bias": spec.b is not None,
        }
        made = LoRALinear(n_in, out, **options).to(getattr(torch, spec.dtype))
        self.fill(made.linear)
        mark_only_lora_as_trainable(made)
        return made

    def weight(self) -> Any:
        return self.module.linear.weight

    def bias(self) -> Any:
        return self.module.linear.bias

    def factors(self) -> Any:
        return self.module.lora_A, self.module.lora_B

    def scaling(self) -> float:
        return self.module.scaling

    def merge(self, safe: bool = False) -> None:
        self.module.merge()


class Litgpt(Implementation):
    name = "litgpt"
    claims = promises.claims("litgpt")

    def version(self) -> str:
        return f"litgpt {importlib.metadata.version('litgpt')}, torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return LitgptLayer(spec)
