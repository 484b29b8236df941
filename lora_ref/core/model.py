"""An adapted model: the base model with adapted layers in it, under PEFT's method names.

Every method checks first, then changes. `lora_ref.api.model` adds speed, all refusals, and an undo of what fails.
"""

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn

from .adapter_modules import AdapterModule, ModulesToSave, holders, unwrap, unwrapped, walk
from .config import LoraConfig
from .inits import METHODS, find, method_of
from .layer import Init, InitOf, LoraLayer
from .layer_types import LAYER_TYPES, kind_of
from .names import Match, ModelNames, Targeting, resolve
from .scaling import check_alpha


class LoraModel(nn.Module):
    """A base model with named adapters in it. The base model is changed in place."""

    lora_layer_types: Mapping[str, type[LoraLayer]] = LAYER_TYPES
    default_targets: Mapping[str, list[str] | str] = {}  # {model_type: target_modules}
    peft_config: dict[str, LoraConfig]  # {adapter: a copy of the user's, with the targets replaced by names}
    active_adapters: list[str]  # the adapters whose updates are added

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training
        if self.adapter_wrappers():
            raise ValueError("the model has adapters already: use add_adapter on the adapted model, or unload it first")
        model.requires_grad_(False)
        self.peft_config, self.active_adapters = {}, []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def adapter_wrappers(self) -> list[AdapterModule]:
        """All modules that hold adapters."""
        return [module for module in self.model.modules() if isinstance(module, AdapterModule)]

    def lora_layers(self) -> dict[str, LoraLayer]:
        """{name: adapted layer}. The name of a raw parameter is its own."""
        found = {}
        for name, parent, attribute in walk(self.model):
            layer: Any = parent._modules[attribute]
            while isinstance(layer, LoraLayer):
                found[f"{name}.{layer.weight_name}" if layer.kind == "parameter" else name] = layer
                layer = layer.base_layer
        return found

    def targeting(self, config: LoraConfig) -> Targeting:
        """What this configuration adapts, and by which rule."""
        return resolve(describe(self.model), config, self.default_targets)

    def _check_known(self, *names: str) -> None:
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"there is no adapter {name!r}; there are {list(self.peft_config)}")

    def _names_or_active(self, names: str | Sequence[str] | None) -> list[str]:
        chosen = list(self.active_adapters if names is None else [names] if isinstance(names, str) else names)
        self._check_known(*chosen)
        if len(set(chosen)) != len(chosen):
            raise ValueError(f"an adapter is named twice: {chosen}")
        return chosen

    def _check_new_name(self, name: str) -> None:
        if name in self.peft_config:
            raise ValueError(f"there is an adapter {name!r} already: delete it first, or choose another name")
        usable = isinstance(name, str) and re.fullmatch(r"[\w -]+", name) and name != "__base__"
        if not usable or hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):
            allowed = "letters, digits, '_', '-' or spaces, not the name of a method"
            raise ValueError(f"adapter name {name!r}: must be {allowed}")

    def _check_not_merged(self, names: Sequence[str], what: str) -> None:
        merged = sorted({n for layer in self.lora_layers().values() for n in layer.merged_adapters if n in names})
        if merged:
            raise ValueError(f"{what} is not possible while {', '.join(merged)} is merged: call unmerge_adapter first")

    def add_adapter(
        self, adapter_name: str, peft_config: LoraConfig, *, autocast_adapter_dtype: bool = True, init: InitOf = None
    ) -> None:
        """Add an adapter, inactive and frozen. `init` gives the init of each layer by name, in place of the config's.

        Raises: ValueError for a name that is taken or not usable, and for what cannot be adapted as asked.
        """
        self._check_new_name(adapter_name)
        config = copy.deepcopy(dataclasses.replace(peft_config))  # checked again; the user's own is not changed
        others = [name for name, c in self.peft_config.items() if c.bias != "none"]
        if config.bias != "none" and others:
            taken = f"adapter {others[0]!r} already trains biases of the base model in place"
            raise ValueError(f"bias={config.bias!r}: {taken}; only one adapter of a model can")
        plan = self.targeting(config)
        self.refuse_config(config, plan, will_init=init is None)
        config.target_modules = plan.target_modules
        was_off = {wrapper.disable_adapters for wrapper in self.adapter_wrappers()} == {True}
        places, held = {name: place for name, *place in walk(self.model)}, holders(self.model)
        with self.init_progress([match for match in plan.matches if match.action], config, init is None) as matches:
            for match in matches:
                wrapper = self._wrap(match, places, held)
                if isinstance(wrapper, ModulesToSave):
                    wrapper.add_adapter(adapter_name)
                    continue
                method, rounded = init(match.name) if init else _init_of(config, wrapper), init is None
                numbers = (match.r, match.lora_alpha)
                try:
                    wrapper.add_adapter(adapter_name, *numbers, config, method, autocast_adapter_dtype, rounded)
                except ValueError as error:
                    raise ValueError(f"{match.name}: {error}") from error
        if was_off:  # then the new wrappers are, too
            self.disable_adapter_layers()
        self.peft_config[adapter_name] = config

    def refuse_config(self, config: LoraConfig, plan: Targeting, will_init: bool = True) -> None:
        """ValueError for what cannot be adapted as asked, before anything changes. `safe.refusals` says more."""
        if not any(match.r for match in plan.matches):
            raise ValueError(f"nothing to adapt: target_modules={config.target_modules!r} match no module")
        places: dict[str, Any] = {name: place for name, *place in walk(self.model)}
        for match in [match for match in plan.matches if match.action]:
            name, parameter = match.place()
            parent, attribute = places[name]
            module = parent._modules[attribute]
            bare = unwrapped(module)
            if isinstance(parent, nn.MultiheadAttention):
                raise ValueError(f"{match.name}: nn.MultiheadAttention reads its weight without calling it")
            if match.r is None or match.scaling is None:
                continue
            kind = "parameter" if parameter else kind_of(bare)
            weight: Any = getattr(bare, parameter or "weight", None)
            if not kind or isinstance(module, ModulesToSave) or not weight.is_floating_point():
                raise ValueError(f"{match.name}: {type(bare).__name__} cannot be adapted")
            if kind == "conv" and match.r % bare.groups:
                raise ValueError(f"{match.name}: r={match.r} must be divisible by groups={bare.groups}")
            if will_init:
                find(config.init_lora_weights, kind, match.name)
                if check := METHODS[method_of(config.init_lora_weights)].check:
                    check(weight.shape, match.r, match.scaling)

    def init_progress(self, matches: list[Match], config: LoraConfig, will_init: bool) -> Any:
        """A `with` block around the work on these matches. `api.model` shows a bar."""
        return nullcontext(matches)

    def _wrap(self, match: Match, places: Mapping[str, Any], held: Mapping[int, Any]) -> Any:
        """The wrapper of a match, installed wherever the module is held, unless it is there already."""
        name, parameter = match.place()
        parent, attribute = places[name]
        module = wrapper = parent._modules[attribute]
        if isinstance(module, ModulesToSave):
            return module
        while isinstance(wrapper, LoraLayer):
            if not parameter or wrapper.weight_name == parameter:
                return wrapper
            wrapper = wrapper.base_layer
        make: Any = self.lora_layer_types["parameter" if parameter else kind_of(module)] if match.r else ModulesToSave
        wrapper = make(module, parameter) if parameter else make(module)
        for parent, attribute in held[id(unwrapped(module))]:
            setattr(parent, attribute, wrapper)
            if isinstance(parent, nn.TransformerEncoderLayer):
                wrapper.register_forward_pre_hook(_leave_the_fast_path)
        return wrapper

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate one adapter, or several whose updates add. They train (not with inference_mode), others are frozen.

        Merged ones are unmerged first. ValueError: an unknown adapter, one named twice, two that save the same module.
        Differs from PEFT: unmerging there leaves rounding errors in the weights.
        """
        names, wrappers = self._names_or_active(adapter_name), self.adapter_wrappers()
        for wrapper in wrappers:
            if isinstance(wrapper, ModulesToSave) and len(both := [n for n in names if n in wrapper.adapters()]) > 1:
                raise ValueError(f"adapters {both} each save a module (modules_to_save): only one can be active")
        if any(isinstance(wrapper, LoraLayer) and wrapper.merged_adapters for wrapper in wrappers):
            self.unmerge_adapter()
        off = [wrapper for wrapper in wrappers if wrapper.disable_adapters]
        for wrapper in off:
            wrapper.enable_adapters(True)
        for wrapper in wrappers:
            wrapper.set_adapter(names, inference_mode)
        for wrapper in off:
            wrapper.enable_adapters(False)
        self.active_adapters = names
        for name in [name for name, config in self.peft_config.items() if config.bias != "none"]:
            for bias in biases(self.model, self.peft_config[name].bias, name).values():
                bias.requires_grad_(name in names and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. If it was the only active one, the first of the others is activated."""
        self._check_known(adapter_name)
        self._check_not_merged([adapter_name], "deleting")
        for bias in biases(self.model, self.peft_config.pop(adapter_name).bias, adapter_name).values():
            bias.requires_grad_(False)
        for wrapper in self.adapter_wrappers():
            wrapper.delete_adapter(adapter_name)
        before, self.active_adapters = self.active_adapters, [n for n in self.active_adapters if n != adapter_name]
        if before and not self.active_adapters and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))

    def set_scale(self, adapter_name: str, factor: float) -> None:
        """s = factor * the configured scaling. ValueError: an unknown or merged adapter; s not finite, or too large."""
        self._check_known(adapter_name)
        check_alpha(factor, "factor")
        self._check_not_merged([adapter_name], "scaling")
        for layer in self.lora_layers().values():
            if adapter_name in layer.r:
                layer.set_scale(adapter_name, factor)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off until `enable_adapter_layers`."""
        for wrapper in self.adapter_wrappers():
            wrapper.enable_adapters(False)

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        for wrapper in self.adapter_wrappers():
            wrapper.enable_adapters(True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A `with` block in which the model is the base model, merged or not. Trained biases stay trained."""
        off = {wrapper: wrapper.disable_adapters for wrapper in self.adapter_wrappers()}
        self.disable_adapter_layers()
        try:
            yield
        finally:
            for wrapper in self.adapter_wrappers():  # new ones are off only if all were
                wrapper.enable_adapters(not off.get(wrapper, bool(off) and all(off.values())))

    @contextmanager
    def mixed_batch(self, adapter_names: Sequence[str]) -> Iterator[None]:
        """A `with` block in which sample i of a batch uses adapter_names[i]; "__base__" means none.

        Raises: ValueError for an unknown or merged adapter, in training mode, and for a batch of another size.
        """
        self._check_known(*(name for name in dict.fromkeys(adapter_names) if name != "__base__"))
        self._check_not_merged(list(self.peft_config), "mixing adapters in a batch")
        if self.training:
            raise ValueError("adapter_names mixes adapters for inference: call model.eval() first")
        wrappers = self.adapter_wrappers()
        try:
            for wrapper in wrappers:
                wrapper.adapter_names = adapter_names if isinstance(adapter_names, tuple) else tuple(adapter_names)
            yield
        finally:
            for wrapper in wrappers:
                wrapper.adapter_names = None

    @torch.no_grad()
    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = True) -> None:
        """Add the updates of the active (or the named) adapters to the base weights, reversibly.

        The output afterwards is base + every adapter that is active or merged. The original weights are kept, which
        costs a copy of each merged weight. Merged weights are always checked: `safe_merge` is for PEFT's scripts.
        Raises: ValueError for an unknown or disabled adapter, a grouped convolution, or weights that are not finite.
        Differs from PEFT: all layers merge or none; active adapters that are not merged still act; unmerging is exact.
        """
        layers = self.lora_layers()
        new = to_merge(layers, self._names_or_active(adapter_names))
        weights = {where: layers[where].merged_weight(names) for where, names in new.items()}
        for where, weight in weights.items():
            if not weight.isfinite().all():
                raise ValueError(f"{where}: merging gives weights that are not finite; nothing was merged")
        for where, weight in weights.items():
            layer = layers[where]
            kept, merged = layer.set_aside or [layer.base_weight], layer.merged_adapters + new[where]
            layer.install_weight(layer.as_weight(weight), kept, merged)

    def unmerge_adapter(self) -> None:
        """Restore the base weights, bit for bit. Active adapters stay active."""
        for layer in self.lora_layers().values():
            layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: str | Sequence[str] | None = None
    ) -> nn.Module:
        """The original base model with the active (or named) adapters merged into it. ValueError as `merge_adapter`."""
        names = self._names_or_active(adapter_names)
        self.enable_adapter_layers()
        if adapter_names is not None:
            self.set_adapter(names)
        self.merge_adapter(names)
        unwrap(self.model)
        return self.model

    def unload(self) -> nn.Module:
        """The plain base model, the original object, its modules_to_save the originals. Trained biases stay trained."""
        self.unmerge_adapter()
        self.disable_adapter_layers()
        unwrap(self.model)
        return self.model

    @property
    def delegate(self) -> nn.Module:
        """The module that attribute lookups fall back to (config, generate, ...)."""
        return self.model

    __getattr__ = AdapterModule.__getattr__


def describe(model: nn.Module) -> ModelNames:
    """What targeting needs to know of a model. transformers is recognised by its methods, not imported."""
    kinds, parameters, heads = dict[str, str](), list[str](), dict[str, str]()
    head: Any = None
    with suppress(Exception):  # transformers' method raises in some models, and others have none
        head = unwrapped(model.get_output_embeddings())  # type: ignore[operator]
    for name, parent, attribute in walk(model):
        module = unwrapped(parent._modules[attribute])
        kinds[name] = kind_of(module)
        heads |= {name: "the output layer"} if module is head else {}
        parameters += [f"{name}.{p}" for p in module._parameters]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return ModelNames(kinds, (*parameters, *model._parameters), model_type, heads)


def biases(model: nn.Module, mode: str, adapter_name: str) -> dict[str, nn.Parameter]:
    """{name: parameter} of the base biases that train with this adapter, names as in `named_parameters()`.

    "none": none of them. "all": every bias, also *_bias and bias_*. "lora_only": the bias of each adapted module.
    They train in place. Switching the adapter off, or unloading it, does NOT restore the original outputs then.
    Source: microsoft/LoRA, `mark_only_lora_as_trainable`; PEFT's LoraConfig, `bias`.
    """
    if mode == "none":
        return {}
    not_base, adapted = set[nn.Module](), set[nn.Module]()
    for module in model.modules():
        if isinstance(module, ModulesToSave):  # the copies are not the base's; nor is what this adapter saves
            not_base.update((module if adapter_name in module.adapters() else module.modules_to_save).modules())
        elif isinstance(module, LoraLayer):  # factors are no biases, whatever the adapter is called
            not_base.update(m for part in module.children() if part is not module.base_layer for m in part.modules())
            adapted.update([module.get_base_layer()] if adapter_name in module.r else [])
    found = {}
    for name, module in model.named_modules():
        for own, bias in module._parameters.items() if module not in not_base else ():
            further = mode == "all" and (own.endswith("_bias") or own.startswith("bias_"))  # as in a GRU
            if bias is not None and (further or own == "bias") and (mode == "all" or module in adapted):
                found[f"{name}.{own}".lstrip(".")] = bias
    return found


def to_merge(layers: Mapping[str, LoraLayer], names: Sequence[str]) -> dict[str, list[str]]:
    """{layer: those of the named adapters that are not merged there yet}; ValueError as `LoraModel.merge_adapter`."""
    new = {}
    for where, layer in layers.items():
        added = [name for name in names if name in layer.r and name not in layer.merged_adapters]
        if added and layer.disable_adapters:
            raise ValueError("the adapters are disabled: enable them before merging")
        if added and layer.groups > 1:
            convolution = f"{where}: the update of a convolution with groups={layer.groups} cannot be merged"
            raise ValueError(f"{convolution}: it connects all inputs to all outputs, which the grouped kernel cannot")
        if added:
            new[where] = added
    return new


def _init_of(config: LoraConfig, layer: LoraLayer) -> Init:
    """The init that the configuration asks for, or the one that a pass over data has left on the base layer."""
    name, prepared = method_of(config.init_lora_weights), vars(unwrapped(layer)).get("prepared_init", {})
    if name in prepared:
        return prepared.pop(name)  # made for the weight as it is now: of no use a second time
    method, option = METHODS[name], getattr(config, f"{name}_config", None)
    return find(config.init_lora_weights, layer.kind, **method.options(option) if method.options and option else {})


def _leave_the_fast_path(module: nn.Module, args: Any) -> None:
    """Does nothing. With a hook in it, TransformerEncoderLayer does not read the weights of linear1 and linear2."""
