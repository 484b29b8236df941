"""transformers' own way to adapters: add_adapter, set_adapter, load_adapter of a PreTrainedModel, on PEFT's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from .. import promises
from ..contract import Array
from .peft_style import Chain, PeftStyle, PeftStyleModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class TinyConfig(transformers.PreTrainedConfig):
    model_type = "lora_ref_chain"


class TinyModel(transformers.PreTrainedModel):
    """A PreTrainedModel that holds a chain's modules under their own names."""

    config_class = TinyConfig

    def __init__(self, chain: Any) -> None:
        super().__init__(TinyConfig())
        for name, module in chain.named_children():
            self.add_module(name, module)
        self.order = chain.order
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The weights are those that the modules came with."""

    def forward(self, x: Tensor) -> Tensor:
        return Chain.forward(self, x)  # type: ignore[arg-type]


class TransformersModel(PeftStyleModel):
    def adapted_net(self, folder: Path | None) -> Any:
        model = TinyModel(self.net)
        if folder is None:
            model.add_adapter(self.config(self.spec.config))
        else:
            model.load_adapter(str(folder))
        return model

    def module(self, name: str) -> nn.Module:
        return self.peft.get_submodule(name)

    def base(self) -> dict[str, tuple[Array, Array | None]]:
        return self.plain(self.peft)

    def enable(self, enabled: bool) -> None:
        (self.peft.enable_adapters if enabled else self.peft.disable_adapters)()

    def add(self, adapter: str, config: Any) -> None:
        self.peft.add_adapter(self.config(config), adapter)

    def set(self, adapters: Any) -> None:
        self.peft.set_adapter(list(adapters))

    def active(self) -> list[str]:
        return list(self.peft.active_adapters())


class Transformers(PeftStyle):
    name = "transformers"
    library = peft
    model_class = TransformersModel
    claims = promises.claims("transformers")

    def version(self) -> str:
        return f"transformers {transformers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
