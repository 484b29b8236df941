"""diffusers' own way to adapters: add_adapter, set_adapters, fuse_lora and load_lora_adapter of a ModelMixin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from .. import promises
from ..contract import Array
from .peft_style import Chain, PeftStyle, PeftStyleModel

diffusers.logging.set_verbosity_error()


class TinyModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """A ModelMixin that holds a chain's modules under their own names."""

    def __init__(self, chain: Any) -> None:
        super().__init__()
        for name, module in chain.named_children():
            self.add_module(name, module)
        self.order = chain.order

    def forward(self, x: Tensor) -> Tensor:
        return Chain.forward(self, x)  # type: ignore[arg-type]


class DiffusersModel(PeftStyleModel):
    def adapted_net(self, folder: Path | None) -> Any:
        model: Any = TinyModel(self.net)
        if folder is None:
            model.add_adapter(self.config(self.spec.config))
        else:
            model.load_lora_adapter(str(folder), prefix=None, adapter_name="default", use_safetensors=True)
        return model

    def module(self, name: str) -> nn.Module:
        return self.peft.get_submodule(name)

    def base(self) -> dict[str, tuple[Array, Array | None]]:
        return self.plain(self.peft)

    def enable(self, enabled: bool) -> None:
        (self.peft.enable_lora if enabled else self.peft.disable_lora)()

    def add(self, adapter: str, config: Mapping[str, Any]) -> None:
        """diffusers makes what it adds the active one, and says neither that it does nor that it does not."""
        before = self.active()
        self.peft.add_adapter(self.config(config), adapter)
        self.set(before)

    def set(self, adapters: Sequence[str]) -> None:
        self.peft.set_adapters(list(adapters))

    def rescale(self, adapter: str, factor: float) -> None:
        """set_adapters takes the factors of all active adapters: the others, which are never changed, have 1."""
        self.peft.set_adapters(self.active(), [factor if name == adapter else 1.0 for name in self.active()])

    def active(self) -> list[str]:
        active = self.peft.active_adapters()
        return [active] if isinstance(active, str) else list(active)

    def delete(self, adapter: str) -> None:
        self.peft.delete_adapters(adapter)

    def merge(self, adapters: Sequence[str] | None = None, safe: bool = False) -> None:
        self.peft.fuse_lora(safe_fusing=safe, adapter_names=None if adapters is None else list(adapters))

    def unmerge(self) -> None:
        self.peft.unfuse_lora()

    def save_own(self, folder: Path) -> None:
        self.peft.save_lora_adapter(str(folder))


class Diffusers(PeftStyle):
    name = "diffusers"
    library = peft
    model_class = DiffusersModel
    claims = promises.claims("diffusers")

    def version(self) -> str:
        return f"diffusers {diffusers.__version__}, peft {peft.__version__}, torch {torch.__version__}"
