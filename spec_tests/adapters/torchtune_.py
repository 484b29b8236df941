"""torchtune's LoRALinear."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from torchtune.modules.peft import LoRALinear, get_adapter_params, set_trainable_params

from .. import promises
from ..contract import Implementation, Layer, LayerSpec
from .torch_layer import TorchLayer


class TorchtuneLayer(TorchLayer):
    def make(self, spec: LayerSpec) -> Any:
        out, n_in = spec.W.shape
        made = LoRALinear(n_in, out, spec.r, spec.lora_alpha, spec.lora_dropout, use_bias=spec.b is not None)
        made = made.to(getattr(torch, spec.dtype))
        self.fill(made)
        set_trainable_params(made, get_adapter_params(made))
        return made

    def weight(self) -> Any:
        return self.module.weight

    def bias(self) -> Any:
        return self.module.bias

    def factors(self) -> Any:
        return self.module.lora_a.weight, self.module.lora_b.weight

    def scaling(self) -> float:
        return self.module.alpha / self.module.rank

    def enable(self, enabled: bool) -> None:
        self.module.disabled = not enabled


class Torchtune(Implementation):
    name = "torchtune"
    claims = promises.claims("torchtune")

    def version(self) -> str:
        return f"torchtune {importlib.metadata.version('torchtune')}, torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return TorchtuneLayer(spec)
