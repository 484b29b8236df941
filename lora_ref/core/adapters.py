"""The adapters of a model: added, chosen, scaled, renamed, deleted; PEFT's methods by PEFT's names.

Every method is all-or-nothing: it checks first, then changes, and what fails changes nothing.
"""

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from ..fast import merging as merge
from ..safe import refusals as checks
from ..safe.atomic import transaction, tree
from ..safe.sharded import check_whole
from . import inject, targeting
from .adapter_modules import AdapterModule, ModulesToSave, frame
from .bias import biases
from .config import LoraConfig
from .layer import Init, LoraLayer
from .layer_types import Linear
from .options import near
from .scaling import check_alpha


class AdaptedModel(nn.Module):
    """A base model with named adapters in it, of which some are active.

    Attributes:
        model: the base model, changed in place.
        peft_config: {adapter name: LoraConfig}, copies of what was passed, targets spelt out.
        active_adapters: the names of the adapters whose updates are added.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        modules = tree(model)
        if any(isinstance(m, AdapterModule) for m in modules):
            raise ValueError("the model has adapters already: use add_adapter on the adapted model, or unload it first")
        for parameter in (p for m in modules for p in m._parameters.values() if p is not None):
            parameter.requires_grad_(False)
        self.model = model
        self.training = model.training
        self.peft_config: dict[str, LoraConfig] = {}
        self.active_adapters: list[str] = []

    # -- looking -------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list of names if they are not exactly one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def active_peft_config(self) -> LoraConfig:
        """The configuration of the (first) active adapter."""
        return self.peft_config[self.active_adapters[0]]

    def wrappers(self) -> list[AdapterModule]:
        """All modules that hold adapters."""
        return [m for m in frame(self.model) if isinstance(m, AdapterModule)]

    def layers(self) -> dict[str, LoraLayer]:
        """{name: adapted layer}; a raw parameter goes by its own name."""
        found = {}
        for name, parent, attribute in inject.walk(self.model):
            layer = getattr(parent, attribute)
            while isinstance(layer, LoraLayer):
                found[f"{name}.{layer.weight_name}" if layer.kind == "parameter" else name] = layer
                layer = layer.base_layer
        return found

    @property
    def targeted_module_names(self) -> list[str]:
        """The names of the modules that are adapted."""
        return [name for name, layer in self.layers().items() if layer.kind != "parameter"]

    def explain(self, adapter_name: str | None = None) -> targeting.Targeting:
        """What an adapter (default: the first active one) adapts, and why: see `lora_ref.explain`."""
        if not self.peft_config:
            raise ValueError("there is no adapter to explain")
        name = adapter_name or (self.active_adapters or list(self.peft_config))[0]
        self._known(name)
        return inject.explain(self.model, self.peft_config[name])

    def _known(self, *names: str) -> None:
        for name in names:
            if name not in self.peft_config:
                known = list(self.peft_config)
                raise ValueError(f"there is no adapter {name!r}; there are {known}{near(str(name), known)}")

    def _named(self, names: str | Sequence[str] | None) -> list[str]:
        """The adapters of these names (one, or several; None: the active ones), which must be known."""
        chosen = self.active_adapters if names is None else [names] if isinstance(names, str) else list(names)
        self._known(*chosen)
        return chosen

    def _new(self, name: str) -> None:
        if name in self.peft_config:
            raise ValueError(f"there is an adapter {name!r} already: delete it first, or choose another name")
        check_adapter_name(name)

    # -- adding, switching, deleting -----------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        autocast_adapter_dtype: bool = True,
        init: Callable[[str], Init] | None = None,
    ) -> None:
        """Add an adapter, inactive and frozen.

        Raises:
            ValueError: the name is taken or not usable, nothing is targeted, a layer cannot be
                adapted as asked, a second adapter has bias != "none", or the model is sharded.
        """
        self._new(adapter_name)
        check_whole(self, "adding an adapter")
        if not isinstance(peft_config, LoraConfig):
            raise TypeError(f"peft_config is a {type(peft_config).__name__}: a lora_ref.LoraConfig is needed")
        config = copy.deepcopy(dataclasses.replace(peft_config))  # validated anew, and the user's own is not touched
        self._check_second(config)
        plan = inject.explain(self.model, config)
        config.base_model_name_or_path = (
            config.base_model_name_or_path or getattr(self.model, "name_or_path", None) or None
        )
        heads = targeting.saved_heads(config)
        if heads:
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
        with transaction(self):
            checks.check(self.model, config, plan, will_init=init is None)
            config.target_modules = plan.target_modules
            off = self._is_off()
            layers = inject.put_in(self.model, config, plan, adapter_name, init, autocast_adapter_dtype)
            if off:  # then what is newly wrapped is, too
                self._switch(False)
            self.peft_config[adapter_name] = config
            transposed = any(layer.fan_in_fan_out for layer in layers if isinstance(layer, Linear))
            config.fan_in_fan_out = transposed and not config.target_parameters  # PEFT refuses the two together

    def _check_second(self, config: LoraConfig) -> None:
        if config.bias != "none":
            other = next((n for n, c in self.peft_config.items() if c.bias != "none"), None)
            if other is not None:
                raise ValueError(
                    f"bias={config.bias!r}: adapter {other!r} already trains biases of the base model in place; "
                    "only one adapter of a model can"
                )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several whose updates add, active and trainable; the others frozen.

        Merged adapters are unmerged first.

        Raises:
            ValueError: an unknown adapter, one named twice, or two that save the same module whole.

        Differs from PEFT: unmerging there subtracts the update, and leaves rounding errors in the weights.
        """
        names = list(self._named(adapter_name))
        if len(set(names)) != len(names):
            raise ValueError(f"an adapter is named twice: {names}")
        wrappers = self.wrappers()
        for wrapper in wrappers:
            if isinstance(wrapper, ModulesToSave) and len(both := [n for n in names if n in wrapper.adapters()]) > 1:
                raise ValueError(f"adapters {both} each save a module whole (modules_to_save): only one can be active")
        trained = {n: list(biases(self.model, config.bias, n).values()) for n, config in self.peft_config.items()}
        with self._switching(flags=True):
            merge.unmerge(wrappers)
            for wrapper in wrappers:
                wrapper.set_adapter(names, inference_mode)
            self.active_adapters = names
            for name, bias in [(name, bias) for name, own in trained.items() for bias in own]:
                bias.requires_grad_(name in names and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it was the only active one, the first that is left becomes active."""
        self._known(adapter_name)
        self._check_not_merged([adapter_name], "deleting")
        check_whole(self, "deleting an adapter")
        with transaction(self):
            for bias in biases(self.model, self.peft_config[adapter_name].bias, adapter_name).values():
                bias.requires_grad_(False)
            for wrapper in self.wrappers():
                wrapper.delete_adapter(adapter_name)
            del self.peft_config[adapter_name]
            was_active = adapter_name in self.active_adapters
            self.active_adapters = [name for name in self.active_adapters if name != adapter_name]
            if was_active and not self.active_adapters and self.peft_config:
                self.set_adapter(next(iter(self.peft_config)))

    def rename_adapter(self, old: str, new: str) -> None:
        """Call an adapter by another name; its place among the others, and its state, stay."""
        self._known(old)
        self._new(new)
        with transaction(self):
            for wrapper in self.wrappers():
                wrapper.rename_adapter(old, new)
            renamed = {new if name == old else name: config for name, config in self.peft_config.items()}
            self.peft_config = renamed
            self.active_adapters = [new if name == old else name for name in self.active_adapters]

    def set_scale(self, adapter_name: str, factor: float) -> None:
        """s = factor * the scaling that the configuration gives, in every layer.

        Raises:
            ValueError: an unknown or merged adapter; a factor, or an s, that is not finite or too large for the dtype.
        """
        self._known(adapter_name)
        check_alpha(factor, "factor")
        self._check_not_merged([adapter_name], "scaling")
        with self._switching():
            for layer in self.layers().values():
                if adapter_name in layer.adapters():
                    layer.set_scale(adapter_name, factor)

    def _switching(self, flags: bool = False) -> AbstractContextManager[None]:
        """A transaction for what switching and merging change, and, with `flags`, for which adapters train."""
        return transaction(self, modules=lambda: frame(self), flags=self._adapter_parameters() if flags else ())

    def _adapter_parameters(self) -> Iterator[nn.Parameter]:
        for wrapper in self.wrappers():
            yield from (parameter for _, parameter in wrapper.parameters_by_adapter())

    def _switch(self, enabled: bool) -> None:
        with self._switching():
            for wrapper in self.wrappers():
                wrapper.enable_adapters(enabled)

    def _is_off(self) -> bool:
        return any(wrapper.disable_adapters for wrapper in self.wrappers())

    def _check_not_merged(self, names: Sequence[str], what: str) -> None:
        merged = sorted({n for layer in self.layers().values() for n in layer.merged_adapters if n in names})
        if merged:
            raise ValueError(f"{what} is not possible while {', '.join(merged)} is merged: call unmerge_adapter first")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or name.startswith("__"):  # not set yet: the object is being made or unpickled
                raise
            return getattr(self.model, name)


def check_adapter_name(name: str) -> None:
    """Raise ValueError unless name can be an attribute of a module and a folder of its own.

    >>> check_adapter_name("../other")
    Traceback (most recent call last):
    ...
    ValueError: adapter name '../other': must be letters, digits, '_', '-' or spaces, not the name of a method
    """
    reserved = name == "__base__" or any(hasattr(cls(), str(name)) for cls in (nn.ModuleDict, nn.ParameterDict))
    if not isinstance(name, str) or not re.fullmatch(r"[\w -]+", name) or reserved:
        raise ValueError(
            f"adapter name {name!r}: must be letters, digits, '_', '-' or spaces, not the name of a method"
        )
