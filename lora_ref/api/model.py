"""LoraModel as users get it: the core's, with speed, all refusals, and an undo of what fails.

The rooms are attached here, in three places:

1. `layer_types` and the merging methods: `fast` gives the same numbers sooner.
2. `refuse`: `safe.refusals` knows all reasons why a model cannot be adapted as asked.
3. The last lines: each method of `safe.atomic.ATOMIC` runs in a transaction, some after a check.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..core import model as core
from ..core.adapter_modules import AdapterModule, unwrap
from ..core.config import LoraConfig
from ..core.inits import METHODS, method_of
from ..core.layer import InitOf, LoraLayer
from ..core.layer_types import LAYER_TYPES, Linear
from ..core.names import HEADS, Match, Targeting
from ..fast import linear, merging
from ..safe import atomic, progress, refusals
from ..safe.plain import check_merged, check_not_sharded, check_plain
from ..safe.strict import did_you_mean
from . import weighted
from .default_targets import ARCHITECTURES
from .explain import Explanation


class LoraModel(core.LoraModel):
    """A base model with named adapters in it. `PeftModel` is the same with saving and loading."""

    layer_types = LAYER_TYPES | {"linear": linear.Linear}
    default_targets = ARCHITECTURES

    def wrappers(self) -> list[AdapterModule]:
        return [m for m in atomic.tree(self.model, factors=False) if isinstance(m, AdapterModule)]

    def add_adapter(
        self, adapter_name: str, peft_config: LoraConfig, autocast_adapter_dtype: bool = True, init: InitOf = None
    ) -> None:
        if not isinstance(peft_config, LoraConfig):
            raise TypeError(f"peft_config is a {type(peft_config).__name__}: a lora_ref.LoraConfig is needed")
        super().add_adapter(adapter_name, peft_config, autocast_adapter_dtype, init)
        config = self.peft_config[adapter_name]  # with notes for the adapter file
        config.base_model_name_or_path = config.base_model_name_or_path or getattr(self.model, "name_or_path", None)
        if heads := HEADS.get(config.task_type or ""):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
        layers = [layer for layer in self.wrappers() if isinstance(layer, Linear) and adapter_name in layer.r]
        transposed = any(layer.fan_in_fan_out for layer in layers)
        config.fan_in_fan_out = transposed and not config.target_parameters  # PEFT refuses the two together

    def _check_known(self, *names: str) -> None:
        for name in names:
            if name not in self.peft_config:
                known = list(self.peft_config)
                raise ValueError(f"there is no adapter {name!r}; there are {known}{did_you_mean(str(name), known)}")

    def refuse(self, config: LoraConfig, plan: Targeting, will_init: bool = True) -> None:
        refusals.refuse(self.model, config, plan, will_init)

    def progress(
        self, matches: list[Match], config: LoraConfig, will_init: bool
    ) -> AbstractContextManager[Iterable[Match]]:
        if not will_init or not METHODS[method_of(config.init_lora_weights)].reads_weight:
            return nullcontext(matches)
        return progress.steps(matches, f"init_lora_weights={config.init_lora_weights!r}")

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = True) -> None:
        layers, names = self._layers_to_merge(adapter_names)
        merging.merge(layers, names)

    def _layers_to_merge(self, adapter_names: str | Sequence[str] | None) -> tuple[dict[str, LoraLayer], list[str]]:
        """All layers and the adapters to merge; ValueError for a layer that cannot be merged as it is stored."""
        check_not_sharded(self, "merging", factors=False)  # of them, check_plain says more
        layers, names = self.layers(), self._names_or_active(adapter_names)
        check_plain({where: layer for where, layer in layers.items() if set(names) & layer.r.keys()}, names)
        return layers, names

    def unmerge_adapter(self) -> None:
        check_merged(self)
        merging.unmerge(self.wrappers())

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = True, adapter_names: str | Sequence[str] | None = None
    ) -> nn.Module:
        """The plain base model with the active (or named) adapters merged into it: the original object.

        The sums are written into the weights' own memory. Weights that would not be finite are refused before the first
        is written. From there on Ctrl-C waits until the model is merged and plain, since there is no exact way back.
        `progressbar` and `safe_merge` are for PEFT's scripts. ValueError as `merge_adapter`: nothing has changed then.
        Differs from PEFT: a weight that is tied to another module's is replaced, and the other keeps its values.
        """
        layers, names = self._layers_to_merge(adapter_names)
        with atomic.uninterrupted(), atomic.switches_and_flags(self):
            self.enable_adapter_layers()
            if adapter_names is not None:
                self.set_adapter(names)
            sums = merging.sums_in_place(self.model, layers, names)
            unwrap(self.model)
            merging.write(sums)
        return self.model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A `with` block in which the model is the base model, merged or not; afterwards all is as before."""
        active, configs, wrappers = self.active_adapters, dict(self.peft_config), self.wrappers()
        was_off = any(wrapper.disable_adapters for wrapper in wrappers)
        for name in [name for name in active if configs[name].bias != "none"]:
            trained = f"adapter {name!r} trains biases of the base model in place (bias != 'none'): "
            stay = "with the adapters disabled, trained biases stay, and the output is not the original's"
            warnings.warn(trained + stay, stacklevel=3)
        check_merged(self)
        weights: Any = [wrapper.base_weight if isinstance(wrapper, LoraLayer) else None for wrapper in wrappers]
        states = [(wrapper, vars(wrapper).copy(), weight) for wrapper, weight in zip(wrappers, weights, strict=True)]
        trains = [(p, p.requires_grad) for p in self.parameters() if isinstance(p, Tensor)]
        owned = {name: core.biases(self.model, c.bias, name).values() for name, c in configs.items()}

        def restore() -> None:
            # adapters may have been renamed, deleted and added meanwhile: a config belongs to one adapter
            names = {then: now for then, c in configs.items() for now, d in self.peft_config.items() if c is d}
            wrappers = self.wrappers()
            merging.unmerge(wrappers)
            for wrapper in wrappers:
                wrapper.enable_adapters(True)
                wrapper.set_adapter([])
            for wrapper, state, weight in states:
                wrapper.active_adapters = [names[name] for name in state["active_adapters"] if name in names]
                vars(wrapper)["disable_adapters"] = state["disable_adapters"]
                merged = [names[name] for name in state.get("merged_adapters", ()) if name in names]
                if not isinstance(wrapper, LoraLayer) or not (merged or wrapper.merged_adapters):
                    continue
                if len(merged) == len(state["merged_adapters"]):
                    wrapper.install_weight(wrapper.as_weight(weight), state["set_aside"], merged)
                else:  # a merged adapter was deleted: merge the others again
                    wrapper.disable_adapters = False
                    merging.merge({"": wrapper}, merged)
            for wrapper in wrappers:
                wrapper.enable_adapters(not was_off)
            for parameter, requires_grad in trains:
                parameter.requires_grad_(requires_grad)
            for bias in [bias for name in configs.keys() - names.keys() for bias in owned[name]]:
                bias.requires_grad_(False)
            self.active_adapters = [names[name] for name in active if name in names]

        try:
            for wrapper in wrappers:
                wrapper.enable_adapters(False)
            yield
        finally:
            atomic.finish(restore)

    def rename_adapter(self, old: str, new: str) -> None:
        """Rename an adapter; its place among the others, and its state, stay."""
        self._check_known(old)
        self._check_new_name(new)
        for wrapper in self.wrappers():
            for values in wrapper.dicts():
                if old in values:
                    values[new] = values.pop(old)
            for names in ("active_adapters", "merged_adapters"):
                if names in vars(wrapper):
                    setattr(wrapper, names, [new if name == old else name for name in getattr(wrapper, names)])
        self.peft_config = {new if name == old else name: config for name, config in self.peft_config.items()}
        self.active_adapters = [new if name == old else name for name in self.active_adapters]

    def explain(self, adapter_name: str | None = None) -> Explanation:
        """What an adapter (default: the first active one) adapts, and why: see `lora_ref.explain`."""
        if not self.peft_config:
            raise ValueError("there is no adapter to explain")
        name = adapter_name or (self.active_adapters or list(self.peft_config))[0]
        self._check_known(name)
        return Explanation(**vars(self.plan(self.peft_config[name])))

    @property
    def targeted_module_names(self) -> list[str]:
        """The names of the modules that are adapted."""
        return [name for name, layer in self.layers().items() if layer.kind != "parameter"]

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list of names if there is not exactly one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def active_peft_config(self) -> LoraConfig:
        """The configuration of the (first) active adapter."""
        return self.peft_config[self.active_adapters[0]]

    add_weighted_adapter = weighted.add_weighted_adapter


CHECKS: dict[str, Callable[[Any], None]] = {
    "delete_adapter": partial(check_not_sharded, what="deleting an adapter"),
    "unload": partial(check_not_sharded, what="unloading"),
    "disable_adapter_layers": check_merged,
    "enable_adapter_layers": check_merged,
}
for name, changes in atomic.ATOMIC.items():
    setattr(LoraModel, name, atomic.atomic(getattr(LoraModel, name), changes, CHECKS.get(name)))
