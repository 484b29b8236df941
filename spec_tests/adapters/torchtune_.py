"""torchtune's LoRALinear, and its functions for models that hold it.

torchtune puts LoRA into no model: a model is written with LoRALinear in it. So target_modules say here which modules of
the chain are LoRALinear.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchtune.modules.peft import (
    LoRALinear,
    disable_adapter,
    get_adapter_params,
    get_adapter_state_dict,
    get_merged_lora_ckpt,
    set_trainable_params,
    validate_missing_and_unexpected_for_lora,
)

from .. import promises
from ..contract import Array, Implementation, Layer, LayerSpec, LayerState, Model, ModelSpec
from .peft_style import Chain, of_model, to_numpy, to_torch
from .torch_layer import TorchLayer


class TorchtuneLayer(TorchLayer):
    def make(self, spec: LayerSpec) -> Any:
        out, n_in = spec.W.shape
        made = LoRALinear(n_in, out, spec.r, spec.lora_alpha, spec.lora_dropout, use_bias=spec.b is not None)
        made = made.to(getattr(torch, spec.dtype))
        self.fill(made)
        set_trainable_params(made, get_adapter_params(made))
        self.off = ExitStack()
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
        switch(self.off, self.module, enabled)

    def merged_copy(self) -> tuple[Array, Array | None]:
        """It takes the state dict of a model, and the names of its modules."""
        model = nn.ModuleDict({"only": self.module})
        merged = get_merged_lora_ckpt(copy.deepcopy(model.state_dict()), self.module.rank, self.module.alpha)
        found = {name: to_numpy(value) for name, value in merged.items()}
        return found.pop("only.weight"), found.pop("only.bias", None)


def switch(off: ExitStack, module: nn.Module, enabled: bool) -> None:
    """Leave all contexts that disable the adapters, or enter one."""
    if enabled:
        off.close()
    else:
        off.enter_context(disable_adapter(module))


class TorchtuneModel(Model):
    def __init__(self, spec: ModelSpec, folder: Path | None = None) -> None:
        self.spec, self.off = spec, ExitStack()
        torch.manual_seed(spec.seed)
        config, ends = spec.config, spec.config["target_modules"]
        self.r, self.alpha = config.get("r", 8), config.get("lora_alpha", 8)
        modules = {name: of_model(module, spec.dtype) for name, module in spec.modules.items()}
        base = Chain(modules, spec)
        self.targets = [name for name in modules if any(f".{name}".endswith(f".{end}") for end in ends)]
        for name in self.targets:
            linear: Any = modules[name]
            options = {"dropout": config.get("lora_dropout", 0.0), "use_bias": linear.bias is not None}
            lora = LoRALinear(linear.in_features, linear.out_features, self.r, self.alpha, **options)
            modules[name] = lora.to(getattr(torch, spec.dtype))
        self.net = Chain(modules, spec)
        missing, unexpected = self.net.load_state_dict(base.state_dict(), strict=False)
        self.validate(base_missing=missing, base_unexpected=unexpected)
        set_trainable_params(self.net, get_adapter_params(self.net))
        if folder is not None:
            saved = torch.load(folder / "adapter_0.pt", weights_only=True)
            missing, unexpected = self.net.load_state_dict(saved, strict=False)
            self.validate(lora_missing=missing, lora_unexpected=unexpected)

    def validate(self, **keys: Any) -> None:
        names: Any = sorted({name.rpartition(".")[2] for name in self.targets})
        validate_missing_and_unexpected_for_lora(names, False, False, **keys)

    def lora(self, name: str) -> Any:
        return self.net.get_submodule(name)

    def adapted(self, adapter: str = "default") -> dict[str, tuple[int, float]]:
        loras = {name: self.lora(name) for name in self.targets}
        return {name: (lora.rank, lora.alpha / lora.rank) for name, lora in loras.items()}

    def read(self, module: str, adapter: str = "default") -> LayerState:
        lora, (W, b) = self.lora(module), self.base()[module]
        return LayerState(W, b, to_numpy(lora.lora_a.weight), to_numpy(lora.lora_b.weight), lora.alpha / lora.rank)

    def write(self, module: str, A: Array, B: Array, adapter: str = "default") -> None:
        lora = self.lora(module)
        for linear, value in ((lora.lora_a, A), (lora.lora_b, B)):
            linear.weight.data = to_torch(value, self.spec.dtype)

    def train(self, mode: bool) -> None:
        self.net.train(mode)

    def training(self) -> bool:
        return bool(self.net.training)

    def forward(self, x: Array, train: bool | None = False, seed: int = 0, adapter_names: Any = None) -> Array:
        if train is not None:
            self.net.train(train)
        torch.manual_seed(seed)
        with torch.no_grad():
            y = self.net(to_torch(x, self.spec.dtype))
        if train is not None:
            self.net.eval()
        return to_numpy(y)

    def named(self) -> dict[str, nn.Parameter]:
        """Parameters by the contract's names."""
        found = {}
        for key, parameter in self.net.named_parameters():
            for theirs, word in ((".lora_a.weight", ".A:default"), (".lora_b.weight", ".B:default")):
                key = key.replace(theirs, word)
            found[key] = parameter
        return found

    def trainable(self) -> set[str]:
        return {name for name, parameter in self.named().items() if parameter.requires_grad}

    def grad(self, x: Array, dy: Array) -> dict[str, Array]:
        self.net.zero_grad()
        self.net.eval()
        y = self.net(to_torch(x, self.spec.dtype))
        if y.requires_grad:  # nothing trains where the adapters are off
            (y * to_torch(dy, self.spec.dtype)).sum().backward()
        return {name: to_numpy(p.grad) for name, p in self.named().items() if p.grad is not None}

    def base(self) -> dict[str, tuple[Array, Array | None]]:
        found = {}
        for name in self.spec.modules:
            module = self.lora(name)
            found[name] = to_numpy(module.weight), None if module.bias is None else to_numpy(module.bias)
        return found

    def enable(self, enabled: bool) -> None:
        switch(self.off, self.net, enabled)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with disable_adapter(self.net):
            yield

    def save_own(self, folder: Path) -> None:
        """As the recipes do."""
        torch.save(get_adapter_state_dict(self.net.state_dict()), folder / "adapter_0.pt")


class Torchtune(Implementation):
    name = "torchtune"
    claims = promises.claims("torchtune")

    def version(self) -> str:
        return f"torchtune {importlib.metadata.version('torchtune')}, torch {torch.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return TorchtuneLayer(spec)

    def model(self, spec: ModelSpec) -> Model:
        return TorchtuneModel(spec)

    def load_own(self, spec: ModelSpec, folder: Path) -> Model:
        return TorchtuneModel(spec, folder)
