"""lora_ref on PyTorch."""

from __future__ import annotations

from typing import Any

from torch import nn

import lora_ref

from ..contract import CLAIMS, Array, LayerSpec
from .peft_style import PeftStyle, PeftStyleModel, configuration, to_numpy, to_torch


class LoraRefModel(PeftStyleModel):
    """Starts that take D0 out of the weight leave the weight alone: the layer subtracts D0 x."""

    def frozen_weight(self, module: str, layer: Any, adapter: str) -> Array:
        starts = layer.part("lora_initial", adapter) is not None and not layer.merged
        return to_numpy(layer.residual(adapter)) if starts else super().frozen_weight(module, layer, adapter)


class LoraRefTorch(PeftStyle):
    """Claims everything."""

    name = "lora_ref"
    library = lora_ref
    model_class = LoraRefModel
    claims = frozenset(CLAIMS)

    def prepare(self, net: nn.Module, config: dict[str, Any], spec: LayerSpec) -> None:
        if spec.init_lora_weights == "corda":
            made = configuration(lora_ref, config)
            data = [to_torch(X, spec.dtype) for X in spec.init_options["inputs"]]
            lora_ref.preprocess_corda(net, made, run_model=lambda: [net(x) for x in data], progress=False)
        if spec.init_lora_weights == "lora_ga":
            made = configuration(lora_ref, config)
            x, dy = (to_torch(spec.init_options[name], spec.dtype) for name in ("x", "dy"))
            lora_ref.preprocess_loraga(net, made, train_step=lambda: (net(x) * dy).sum().backward(), progress=False)

    def after(self, model: PeftStyleModel, spec: LayerSpec) -> None:
        data = [to_torch(X, spec.dtype) for X in spec.init_options["inputs"]]
        lora_ref.initialize_lora_eva_weights(model.peft, data, show_progress_bar=False)
