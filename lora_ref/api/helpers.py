"""Small functions that PEFT's scripts import beside PeftModel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.adapter_modules import AdapterModule
from ..core.layer import LoraLayer, checked_scaling
from ..files.config_file import LoraConfig


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Does this local folder hold the configuration of an adapter that can be read here?

    Source: PEFT's function of this name.
    Differs from PEFT: only local folders are read, and an option that is not supported makes it False.

    >>> check_if_peft_model("no/such/folder")
    False
    """
    try:
        LoraConfig.from_pretrained(model_name_or_path)
    except (ValueError, OSError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """A `with` block in which each s is multiplied: s <- multiplier * s, for all adapters.

    Raises: TypeError: not a number; ValueError: no adapted layer, a merged one, or a scaling that is not finite.
    Source: PEFT's function of this name.

    >>> from lora_ref import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=2, lora_alpha=4, target_modules=["0"]))
    >>> with rescale_adapter_scale(model, 0.25):
    ...     model.model[0].scaling
    {'default': 0.5}
    >>> model.model[0].scaling
    {'default': 2.0}
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier={multiplier!r}: must be a number")
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(f"the {type(model).__name__} has no adapted layer: add an adapter first")
    if merged := {name for layer in layers for name in layer.merged_adapters}:
        raise ValueError(f"{', '.join(sorted(merged))} is merged: unmerge before you rescale")
    before = [dict(layer.scaling) for layer in layers]
    after = [
        {name: checked_scaling(s * multiplier, layer.base_weight.dtype) for name, s in scaling.items()}
        for layer, scaling in zip(layers, before, strict=True)
    ]
    try:
        for layer, scaling in zip(layers, after, strict=True):
            layer.scaling = scaling
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):  # as many as are there now
            layer.scaling = {name: scaling.get(name, s) for name, s in layer.scaling.items()}


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> torch.optim.Optimizer:
    """An optimizer with the learning rate lr for A, and lr * loraplus_lr_ratio for B.

    The factors of embeddings have the rate `loraplus_lr_embedding` (default 1e-6). `loraplus_weight_decay` applies to
    all but biases and layer norms. The other arguments are those of optimizer_cls.
    Raises: ValueError: no factor trains, or a rate that is not positive.
    Source: LoRA+, arXiv 2402.12354, section 3, and PEFT's function of this name.

    >>> from lora_ref import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    >>> made = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    >>> [(group["lr"], len(group["params"])) for group in made.param_groups if group["params"]]
    [(0.01, 1), (0.16, 1)]
    """
    decay, embedding_rate = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    for name, value in (
        ("lr", lr),
        ("loraplus_lr_ratio", loraplus_lr_ratio),
        ("loraplus_lr_embedding", embedding_rate),
    ):
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r}: must be a positive number")
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("A", "embedding", "B", "not decayed")}
    norms = {id(p) for m in model.modules() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[group_of(name, parameter.ndim, id(parameter) in norms)].append(parameter)
    if not (groups["A"] or groups["B"] or groups["embedding"]):
        raise ValueError("no factor trains: adapt the model, or call set_adapter, before you make the optimizer")
    rates = {"A": lr, "embedding": embedding_rate, "B": lr * loraplus_lr_ratio, "not decayed": lr * loraplus_lr_ratio}
    options = [
        {"params": groups[name], "lr": rate, "weight_decay": 0.0 if name == "not decayed" else decay}
        for name, rate in rates.items()
    ]
    return optimizer_cls(options, **kwargs)


def group_of(name: str, ndim: int, is_norm: bool) -> str:
    """The group of a parameter in LoRA+: "A", "embedding", "B" or "not decayed".

    >>> [group_of(f"m.{part}.default", 2, False) for part in ("lora_A", "lora_embedding_A", "lora_B")]
    ['A', 'embedding', 'B']
    """
    if "lora_embedding_" in name:
        return "embedding"
    if "lora_B" in name or ndim == 1:
        return "not decayed" if name.endswith("bias") or is_norm else "B"
    return "A"


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """A `with` block in which adapters get their input in the dtype that it has.

    PEFT needs it for layerwise casting, where a hook casts the weights. There is nothing to switch off here: an input
    is never cast to a narrower dtype where a hook may still cast the weight.
    Raises: ValueError: the model has no adapters.
    """
    if active and not any(isinstance(module, AdapterModule) for module in model.modules()):
        raise ValueError(f"the {type(model).__name__} has no adapters: add one first")
    yield


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters that train become float32, the others `dtype`.

    Source: PEFT's function of this name.
    Differs from PEFT: integers stay. In packed weights they are bits, and no numbers to cast.
    """
    for parameter in [p for p in model.parameters() if p.is_floating_point()]:
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
