"""What state the adapters of a model are in: for each layer, and for the model as a whole."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..core.adapter_modules import AdapterModule
from ..core.layer import LoraLayer
from ..files.model_card import is_of_transformers
from ..safe.quantized import is_quantized
from .model import LoraModel

Irregular = Literal["irregular"]
SAVED = "ModulesToSaveWrapper"  # the module_type of a module that is saved whole


@dataclass(frozen=True)
class TunerLayerStatus:
    """One module that holds adapters. Source: PEFT's class of this name."""

    name: str  # in the base model
    module_type: str  # PEFT's names: "lora.Linear", "lora.Conv2d", ..., "ModulesToSaveWrapper"
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]  # of all parameters of an adapter
    available_adapters: list[str]
    devices: dict[str, list[str]]  # the types of the devices: "cpu", "cuda"
    quantization_backend: str | None  # of the base layer: the library that packed its weight


@dataclass(frozen=True)
class TunerModelStatus:
    """All of them together. "irregular": it is not the same everywhere. Source: PEFT's class of this name."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each module that holds adapters.

    Raises: ValueError: there is none.
    Source: PEFT's function of this name, whose fields these are.

    >>> from lora_ref import LoraConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]))
    >>> model.merge_adapter()
    >>> status = get_layer_status(model)[0]
    >>> status.name, status.module_type, status.merged_adapters, status.requires_grad
    ('model.0', 'lora.Linear', ['default'], {'default': True})
    """
    base = tuner_of(model)
    found = [status_of(name, m) for name, m in base.named_modules() if isinstance(m, AdapterModule)]
    if not found:
        raise ValueError(f"the {type(base).__name__} holds no adapters: call get_peft_model or add_adapter first")
    return found


def tuner_of(model: nn.Module) -> Any:
    """The LoraModel in a PeftModel, or the model itself."""
    inner = model._modules.get("base_model")
    return inner if isinstance(inner, LoraModel) else model


def status_of(name: str, wrapper: Any) -> TunerLayerStatus:
    """The state of one module."""
    parameters = list(wrapper.adapter_parameters())
    adapters = list(dict.fromkeys(adapter for adapter, _ in parameters))
    is_lora = isinstance(wrapper, LoraLayer)
    base: Any = wrapper.get_base_layer() if is_lora else None
    return TunerLayerStatus(
        name=name,
        module_type=module_type(wrapper),
        enabled=not wrapper.disable_adapters,
        active_adapters=list(wrapper.active_adapters),
        merged_adapters=list(wrapper.merged_adapters) if is_lora else [],
        requires_grad={a: common({p.requires_grad for b, p in parameters if b == a}) for a in adapters},
        available_adapters=sorted(adapters),
        devices={a: sorted({p.device.type for b, p in parameters if b == a}) for a in adapters},
        quantization_backend=backend_of(base) if is_lora and is_quantized(base) else None,
    )


def backend_of(module: nn.Module) -> str:
    """PEFT's name of what packed a weight: "bnb 8bit", "bnb 4bit", "torchao", or the library of its class."""
    bits = {"Linear8bitLt": "bnb 8bit", "Linear4bit": "bnb 4bit"}
    return bits.get(type(module).__name__, type(module.weight).__module__.partition(".")[0])


def module_type(wrapper: Any) -> str:
    """What PEFT calls the module: one class of ours may be several of its.

    >>> from lora_ref.api.layers import Conv
    >>> module_type(Conv(nn.Conv2d(1, 1, 1)))
    'lora.Conv2d'
    """
    if not isinstance(wrapper, LoraLayer):
        return SAVED
    if wrapper.kind == "conv":
        return f"lora.Conv{wrapper.base_weight.ndim - 2}d"
    return "lora.ParamWrapper" if wrapper.kind == "parameter" else f"lora.{type(wrapper).__name__}"


def common(values: Iterable[Any]) -> Any:
    """The one value, or "irregular"."""
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapters together. What differs between its layers is "irregular".

    Raises: ValueError: there is none.
    Source: PEFT's function of this name, whose fields these are.

    >>> from lora_ref import LoraConfig, get_peft_model
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> model = get_peft_model(net, LoraConfig(r=1, target_modules=["0", "1"]))
    >>> model.model[0].enable_adapters(False)
    >>> status = get_model_status(model)
    >>> status.num_adapter_layers, status.enabled, status.requires_grad
    (2, 'irregular', {'default': 'irregular'})
    """
    layers = get_layer_status(model)
    adapted = tuner_of(model)
    is_tuner = isinstance(adapted, LoraModel)
    base = adapted.model if is_tuner else adapted
    named = is_tuner or is_of_transformers(base)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    saved = [layer.active_adapters for layer in layers if layer.module_type == SAVED]
    idle = [layer for layer in layers if {*active} & {*layer.available_adapters} - {*layer.active_adapters}]
    mixed = bool(idle) or any(names != active for names in saved)  # a layer need not have every active adapter
    merged = {name for layer in layers for name in layer.merged_adapters}
    partly = any(merged & {*layer.available_adapters} - {*layer.merged_adapters} for layer in layers)
    names = sorted({name for layer in layers for name in layer.available_adapters})
    grads = {n: [layer.requires_grad[n] for layer in layers if n in layer.requires_grad] for n in names}
    return TunerModelStatus(
        base_model_type=type(base).__name__ if named else "other",
        adapter_model_type=type(adapted).__name__ if is_tuner else "None",
        peft_types=dict.fromkeys(adapted.peft_config, "LORA") if is_tuner else {},
        trainable_params=sum(n for n, trains in sizes if trains),
        total_params=sum(n for n, _ in sizes),
        num_adapter_layers=len(layers),
        enabled=common(layer.enabled for layer in layers),
        active_adapters="irregular" if mixed else active,
        merged_adapters="irregular" if partly else sorted(merged),
        requires_grad={name: common(values) for name, values in grads.items()},
        available_adapters=names,
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, [])}) for n in names},
        quantization_backend=common(layer.quantization_backend for layer in layers if layer.module_type != SAVED),
    )
