"""LyCORIS' LoConModule, its LoRA. Its dropout acts elsewhere and its alpha = 0 means r, by design: not claimed."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from lycoris.modules.locon import LoConModule

from .. import promises
from ..contract import Implementation, Layer, LayerSpec
from .peft_style import base_module
from .torch_layer import TorchLayer


class LycorisLayer(TorchLayer):
    on, merged = True, False

    def make(self, spec: LayerSpec) -> Any:
        base = base_module(spec.kind, spec.W, spec.b, spec.dtype, spec).requires_grad_(False)
        self.lora = LoConModule("lora", base, 1.0, spec.r, spec.lora_alpha, rs_lora=spec.use_rslora)
        self.lora = self.lora.to(getattr(torch, spec.dtype))
        self.lora.apply_to()
        return base

    def weight(self) -> Any:
        return self.module.weight

    def bias(self) -> Any:
        return self.module.bias

    def factors(self) -> Any:
        return self.lora.lora_down.weight, self.lora.lora_up.weight

    def scaling(self) -> float:
        return self.lora.scale

    def enable(self, enabled: bool) -> None:
        self.arrange(enabled, self.merged)

    def merge(self, safe: bool = False) -> None:
        self.arrange(self.on, True)

    def unmerge(self) -> None:
        self.arrange(self.on, False)

    def arrange(self, on: bool, merged: bool) -> None:
        """The library's two ways of acting, each switched on and off once: it counts neither."""
        now = self.on, self.merged
        self.on, self.merged = on, merged
        before, after = ((a and b, a and not b) for a, b in (now, (on, merged)))
        if before[0] and not after[0]:
            self.lora.onfly_restore()
        if before[1] and not after[1]:
            self.lora.restore()
        if after[0] and not before[0]:
            self.lora.onfly_merge()
        if after[1] and not before[1]:
            self.lora.apply_to()


class Lycoris(Implementation):
    name = "lycoris"
    claims = promises.claims("lycoris") - (set() if hasattr(LoConModule, "onfly_merge") else {"merge", "unmerge"})

    def version(self) -> str:
        return f"lycoris-lora {importlib.metadata.version('lycoris_lora')}, torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return LycorisLayer(spec)
