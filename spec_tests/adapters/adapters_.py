"""AdapterHub's adapters: LoRA at the output projection of the one layer of a tiny transformer.

Its model interface names the places of a transformer, so linear layers alone can be adapted, one of each kind.
"""

from __future__ import annotations

import logging
from typing import Any

import adapters
import torch
import transformers
from torch import Tensor, nn

from .. import promises
from ..contract import Implementation, Layer, LayerSpec
from .peft_style import base_module
from .torch_layer import TorchLayer

logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns at every forward without an active adapter
INTERFACE = adapters.AdapterModelInterface(
    adapter_methods=["lora"],
    model_embeddings="embeddings",
    model_layers="layers",
    layer_self_attn="attention",
    layer_cross_attn=None,
    attn_k_proj="k",
    attn_q_proj="q",
    attn_v_proj="v",
    attn_o_proj="o",
    layer_intermediate_proj="up",
    layer_output_proj="down",
)


class TinyConfig(transformers.PretrainedConfig):
    model_type = "lora_ref_tiny"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(1, 1) for _ in range(4))


class Block(nn.Module):
    """The places that the interface names; `down` alone is called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention, self.up, self.down = Attention(), nn.Linear(1, 1), layer


class TinyModel(transformers.PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(TinyConfig(hidden_size=1, num_hidden_layers=1, num_attention_heads=1))
        self.embeddings = nn.Embedding(1, 1)
        self.layers = nn.ModuleList([Block(layer)])
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The weights are those that the modules came with."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        block: Any = self.layers[0]
        return block.down(x)


class AdaptersLayer(TorchLayer):
    def make(self, spec: LayerSpec) -> Any:
        model: Any = TinyModel(base_module(spec.kind, spec.W, spec.b, spec.dtype, spec))
        adapters.init(model, interface=INTERFACE)
        config = adapters.LoRAConfig(
            selfattn_lora=False,
            output_lora=True,
            attn_matrices=[],
            r=spec.r,
            alpha=spec.lora_alpha,
            dropout=spec.lora_dropout,
            dtype=spec.dtype,
        )
        model.add_adapter("default", config=config)
        model.train_adapter("default")
        return model

    @property
    def layer(self) -> Any:
        return self.module.layers[0].down

    def weight(self) -> Any:
        return self.layer.weight

    def bias(self) -> Any:
        return self.layer.bias

    def factors(self) -> Any:
        lora = self.layer.loras["default"]
        return lora.lora_A, lora.lora_B

    def scaling(self) -> float:
        return float(self.layer.loras["default"].scaling)

    def enable(self, enabled: bool) -> None:
        self.module.set_active_adapters("default" if enabled else None)

    def merge(self, safe: bool = False) -> None:
        self.module.merge_adapter("default")

    def unmerge(self) -> None:
        self.module.reset_adapter()


class Adapters(Implementation):
    name = "adapters"
    claims = promises.claims("adapters")

    def version(self) -> str:
        return f"adapters {adapters.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return AdaptersLayer(spec)
