"""LoraModel as users get it: the core's, with speed, all refusals, and an undo of what fails.

The rooms are attached here, in three places:

1. `lora_layer_types` and the merging methods: `fast` gives the same numbers sooner.
2. `refuse_config`: `safe.refusals` knows all reasons why a model cannot be adapted as asked.
3. The last lines: each method of `safe.atomic.ATOMIC` runs in a transaction, some after a check.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core import layer_types
from ..core import model as core
from ..core.adapter_modules import AdapterModule, ModulesToSave, unwrap, unwrapped
from ..core.config import LoraConfig
from ..core.inits import METHODS, method_of
from ..core.layer import InitOf, LoraLayer
from ..core.names import HEADS, Match, Targeting, resolve
from ..fast import merging
from ..files.adapter_folder import allocate_nothing
from ..safe import atomic, progress, refusals
from ..safe.plain import check_merged, check_not_sharded, check_plain, warn_of_forward_hooks
from ..safe.quantized import PLAIN, is_quantized
from ..safe.recomputed import checked
from ..safe.strict import did_you_mean, levels_to_the_caller
from ..safe.unreached import describe
from . import weighted
from .default_targets import ARCHITECTURES
from .layers import CALLED, LAYER_TYPES, Linear, QuantizedLinear

CHECKED: weakref.WeakKeyDictionary[nn.Module, list[str]] = weakref.WeakKeyDictionary()  # {model: its adapters then}

HELD = "_lora_model"  # the attribute of an injected model that holds its LoraModel, outside of nn.Module's own dicts


def linear_layer(module: Any) -> LoraLayer:
    """The adapted layer of a linear one, whose weight may be packed."""
    plain = type(module.weight) is nn.Parameter and module.weight.dtype in PLAIN
    return Linear(module) if plain or not is_quantized(module) else QuantizedLinear(module)


class LoraModel(core.LoraModel):
    """A base model with named adapters in it. `PeftModel` is the same with saving and loading."""

    lora_layer_types = LAYER_TYPES | {"linear": linear_layer}
    prefix = "lora_"  # of the names of all parameters that adapters add
    default_targets = ARCHITECTURES

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> None:
        """With a configuration: `add_adapter` and `set_adapter`."""
        with atomic.transaction(model):
            super().__init__(model)
            self.vocabulary_before: int | None = None
            with suppress(Exception):  # no transformers model
                self.vocabulary_before = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
            if peft_config is not None:
                self.add_adapter(adapter_name, peft_config, low_cpu_mem_usage)
                self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        y = self.model(*args, **kwargs)
        if not torch.compiler.is_compiling() and CHECKED.get(self) != list(self.peft_config):
            self._warn_of_layers_that_were_not_called()
        return y

    def _warn_of_layers_that_were_not_called(self) -> None:
        """Something may read their weights, or compute without them. Then their adapters never act."""
        CHECKED[self] = list(self.peft_config)
        layers = self.lora_layers().items()
        if any(m._compiled_call_impl or "_orig_mod" in m._modules for m in atomic.tree(self.model, factors=False)):
            return  # compiled parts do not tell which layers they call
        idle = [where for where, m in layers if m.active_adapters and not (m.disable_adapters or m in CALLED)]
        if idle:
            named = ", ".join(idle[:3] + ["..."] * (len(idle) > 3))
            what = f"{len(idle)} adapted layers were not called in the first forward ({named})"
            why = "if the model never calls them, their adapters do not act: leave them out with exclude_modules"
            warnings.warn(f"{what}; {why}", stacklevel=levels_to_the_caller())

    def adapter_wrappers(self) -> list[AdapterModule]:
        return [m for m in atomic.tree(self.model, factors=False) if isinstance(m, AdapterModule)]

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        init: InitOf = None,
    ) -> None:
        """As `core.model.LoraModel.add_adapter`.

        `low_cpu_mem_usage`: the factors get no numbers yet (device "meta"); `set_peft_model_state_dict` brings them.
        An init with an initial update D0 computes its factors all the same.
        """
        if not isinstance(peft_config, LoraConfig):
            raise TypeError(f"peft_config is a {type(peft_config).__name__}: a lora_ref.LoraConfig is needed")
        if low_cpu_mem_usage and not METHODS[method_of(peft_config.init_lora_weights)].changes_base:
            init = init or (lambda name: allocate_nothing)
        super().add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype, init=init)
        config = self.peft_config[adapter_name]  # with notes for the adapter file
        config.base_model_name_or_path = config.base_model_name_or_path or getattr(self.model, "name_or_path", None)
        if heads := HEADS.get(config.task_type or ""):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))
        layers = [m for m in self.adapter_wrappers() if isinstance(m, layer_types.Linear) and adapter_name in m.r]
        transposed = any(layer.fan_in_fan_out for layer in layers)
        config.fan_in_fan_out = transposed and not config.target_parameters  # PEFT refuses the two together

    def _wrap(self, match: Match, places: Mapping[str, Any], held: Mapping[int, Any]) -> Any:
        wrapper = super()._wrap(match, places, held)
        if isinstance(wrapper, ModulesToSave) and not wrapper._forward_hooks:
            wrapper.register_forward_hook(check_copy)
        return wrapper

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters train, or freeze them. Which are active stays. A B that never trains (MiCA) stays frozen.

        Raises: ValueError: an unknown adapter.
        """
        names = self._names_or_active(adapter_names)
        for wrapper in self.adapter_wrappers():
            fixed = [
                wrapper.factors(n)[1]
                for n in wrapper.adapters()
                if isinstance(wrapper, LoraLayer) and not wrapper.train_B[n]
            ]
            for name, parameter in wrapper.adapter_parameters():
                if name in names and not any(parameter is B for B in fixed):
                    parameter.requires_grad_(requires_grad)

    def _check_known(self, *names: str) -> None:
        for name in names:
            if not isinstance(name, str) or name not in self.peft_config:
                known = list(self.peft_config)
                raise ValueError(f"there is no adapter {name!r}; there are {known}{did_you_mean(str(name), known)}")

    def targeting(self, config: LoraConfig) -> Targeting:
        everything = str(config.target_modules).lower() == "all-linear"  # only then layers may be left out
        names = describe(self.model) if everything else core.describe(self.model)
        return resolve(names, config, self.default_targets)

    def refuse_config(self, config: LoraConfig, plan: Targeting, will_init: bool = True) -> None:
        refusals.refuse(self.model, config, plan, will_init)

    def init_progress(
        self, matches: list[Match], config: LoraConfig, will_init: bool
    ) -> AbstractContextManager[Iterable[Match]]:
        if not will_init or not METHODS[method_of(config.init_lora_weights)].reads_weight:
            return nullcontext(matches)
        return progress.steps(matches, f"init_lora_weights={config.init_lora_weights!r}")

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None, safe_merge: bool = True) -> None:
        layers, names = self._layers_to_merge(adapter_names)
        merged = [name for name in names if any(name in layer.merged_adapters for layer in layers.values())]
        if merged:
            warnings.warn(f"{', '.join(merged)} is merged already: nothing is added", stacklevel=levels_to_the_caller())
        merging.merge(layers, names)

    def _layers_to_merge(self, adapter_names: str | Sequence[str] | None) -> tuple[dict[str, LoraLayer], list[str]]:
        """All layers and the adapters to merge; ValueError for a layer that cannot be merged as it is stored."""
        check_not_sharded(self, "merging", factors=False)  # of them, check_plain says more
        layers, names = self.lora_layers(), self._names_or_active(adapter_names)
        if adapter_names is not None and not names:
            raise ValueError(f"adapter_names={adapter_names!r}: name an adapter, or None for the active ones")
        to_merge = {where: layer for where, layer in layers.items() if set(names) & layer.r.keys()}
        check_plain(to_merge, names)
        warn_of_forward_hooks(to_merge)
        return layers, names

    def unmerge_adapter(self) -> None:
        check_merged(self)
        merging.unmerge(self.adapter_wrappers())

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
            end_ties(self.model)
        return self.model

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A `with` block in which the model is the base model, merged or not; afterwards all is as before."""
        active, configs, wrappers = self.active_adapters, dict(self.peft_config), self.adapter_wrappers()
        was_off = {wrapper.disable_adapters for wrapper in wrappers} == {True}
        for name in [name for name in active if configs[name].bias != "none"]:
            trained = f"adapter {name!r} trains biases of the base model in place (bias != 'none'): "
            stay = "with the adapters disabled, trained biases stay, and the output is not the original's"
            warnings.warn(trained + stay, stacklevel=levels_to_the_caller())
        check_merged(self)
        weights: Any = [wrapper.base_weight if isinstance(wrapper, LoraLayer) else None for wrapper in wrappers]
        states = [(wrapper, vars(wrapper).copy(), weight) for wrapper, weight in zip(wrappers, weights, strict=True)]
        trains = [(p, p.requires_grad) for p in self.parameters() if isinstance(p, Tensor)]
        owned = {name: core.biases(self.model, c.bias, name).values() for name, c in configs.items()}

        def restore() -> None:
            # adapters may have been renamed, deleted and added meanwhile: a config belongs to one adapter
            names = {then: now for then, c in configs.items() for now, d in self.peft_config.items() if c is d}
            wrappers = self.adapter_wrappers()
            merging.unmerge(wrappers)
            for wrapper in wrappers:
                wrapper.enable_adapters(True)
                wrapper.set_adapter([])
            for wrapper, state, weight in states:
                wrapper.active_adapters = [names[name] for name in state["active_adapters"] if name in names]
                vars(wrapper).update(disable_adapters=state["disable_adapters"], frozen=state["frozen"])
                merged = [names[name] for name in state.get("merged_adapters", ()) if name in names]
                if not isinstance(wrapper, LoraLayer) or not (merged or wrapper.merged_adapters):
                    continue
                if len(merged) == len(state["merged_adapters"]):
                    wrapper.install_weight(wrapper.as_weight(weight), state["set_aside"], merged)
                else:  # a merged adapter was deleted: merge the others again
                    wrapper.disable_adapters = False
                    merging.merge({"": wrapper}, merged)
                    wrapper.enable_adapters(not state["disable_adapters"])
            known = {id(wrapper) for wrapper, _, _ in states}
            for wrapper in [wrapper for wrapper in wrappers if id(wrapper) not in known]:
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
        for wrapper in self.adapter_wrappers():
            for values in wrapper.dicts():
                if old in values:
                    values[new] = values.pop(old)
            for names in ("active_adapters", "merged_adapters"):
                if names in vars(wrapper):
                    setattr(wrapper, names, [new if name == old else name for name in getattr(wrapper, names)])
        self.peft_config = {new if name == old else name: config for name, config in self.peft_config.items()}
        self.active_adapters = [new if name == old else name for name in self.active_adapters]

    @property
    def targeted_module_names(self) -> list[str]:
        """The names of the modules that are adapted."""
        return [name for name, layer in self.lora_layers().items() if layer.kind != "parameter"]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The names of the raw parameters that are adapted."""
        return [name for name, layer in self.lora_layers().items() if layer.kind == "parameter"]

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list of names if there is not exactly one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def active_peft_config(self) -> LoraConfig:
        """The configuration of the (first) active adapter."""
        return self.peft_config[self.active_adapters[0]]

    add_weighted_adapter = weighted.add_weighted_adapter


def check_copy(module: Any, args: Any, y: Any) -> Any:
    """The output of a module that is saved whole, checked as that of an adapted layer is."""
    return checked(module, y)


def end_ties(model: Any) -> None:
    """If the input and the output embeddings of a transformers model differ, say so in its config: tied no more.

    Or a saved model would be tied again when it is loaded. The flag is for all ties, so the others are copied apart.
    """
    ends: tuple[Any, ...] = ()
    with suppress(Exception):  # transformers' methods raise in some models, and others have none
        if model.config.tie_word_embeddings:
            ends = tuple(unwrapped(e).weight for e in (model.get_input_embeddings(), model.get_output_embeddings()))
    if not ends or ends[0] is ends[1]:
        return
    model.config.tie_word_embeddings = False
    seen: set[int] = set()
    for module in atomic.tree(model):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                copy = parameter.detach().clone()
                module._parameters[name] = nn.Parameter(copy, requires_grad=parameter.requires_grad)
            seen.add(id(parameter))


CHECKS: dict[str, Callable[[Any], None]] = {
    "delete_adapter": partial(check_not_sharded, what="deleting an adapter"),
    "unload": partial(check_not_sharded, what="unloading"),
    "disable_adapter_layers": check_merged,
    "enable_adapter_layers": check_merged,
}
for name, changes in atomic.ATOMIC.items():
    setattr(LoraModel, name, atomic.atomic(getattr(LoraModel, name), changes, CHECKS.get(name)))
