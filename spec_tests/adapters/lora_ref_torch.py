"""lora_ref on PyTorch."""

from __future__ import annotations

from typing import Any

from torch import nn

import lora_ref
from lora_ref.init.options import LoraGAConfig

from ..contract import CLAIMS, LayerSpec, LayerState
from .peft_style import PeftStyle, PeftStyleModel, configuration, to_numpy, to_torch


class LoraRefModel(PeftStyleModel):
    def read(self, module: str, adapter: str = "default") -> LayerState:
        """W is the weight beside s B A while the adapter is active: W - D0 where its init subtracts D0 (PiSSA)."""
        state, layer = super().read(module, adapter), self.module(module)
        if layer.disable_adapters or layer.merged_adapters or layer.groups > 1:  # no start exists for groups
            return state
        return state._replace(W=to_numpy(layer.residual(adapter)).reshape(state.W.shape))

    def rescale(self, adapter: str, factor: float) -> None:
        self.lora_model.set_scale(adapter, factor)


#: It merges in place: merge_and_unload gives the same layers back. It has no layer of which parts are adapted.
NOT_OFFERED = {"merged_copy", "fused"}


class LoraRefTorch(PeftStyle):
    """Claims everything that it offers."""

    name = "lora_ref"
    library = lora_ref
    model_class = LoraRefModel
    claims = frozenset(CLAIMS) - NOT_OFFERED

    def prepare(self, net: nn.Module, config: dict[str, Any], spec: LayerSpec) -> None:
        if spec.init_lora_weights == "corda":
            made = configuration(lora_ref, config)
            data = [to_torch(X, spec.dtype) for X in spec.init_options["inputs"]]
            lora_ref.preprocess_corda(net, made, run_model=lambda: [net(x) for x in data], progress=False)
        if spec.init_lora_weights == "lora_ga":
            made = configuration(lora_ref, config)
            x, dy = (to_torch(spec.init_options[name], spec.dtype) for name in ("x", "dy"))
            lora_ref.preprocess_loraga(net, made, train_step=lambda: (net(x) * dy).sum().backward(), progress=False)

    def layer_options(self, spec: LayerSpec) -> dict[str, Any]:
        if spec.init_lora_weights == "lora_ga" and "direction" in spec.init_options:
            return {"lora_ga_config": LoraGAConfig(direction=spec.init_options["direction"])}
        return super().layer_options(spec)

    def after(self, model: PeftStyleModel, spec: LayerSpec) -> None:
        data = [to_torch(X, spec.dtype) for X in spec.init_options["inputs"]]
        lora_ref.initialize_lora_eva_weights(model.peft, data, show_progress_bar=False)
