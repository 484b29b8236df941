"""From names to layers: look at a model, decide what is adapted, check it, put the layers in."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from . import init as inits
from . import targeting
from .config import LoraConfig
from .layers import Conv, Embedding, Init, Linear, LoraLayer, is_conv1d_of_transformers
from .parameters import Parameter
from .targeting import ModelNames, Targeting
from .wrappers import AdapterModule, ModulesToSave

WRAPPERS: dict[str, type[LoraLayer]] = {"linear": Linear, "embedding": Embedding, "conv": Conv}


def kind_of(module: nn.Module) -> str:
    """ "linear", "embedding", "conv", or "" for a module that no adapted layer exists for.

    >>> kind_of(nn.Linear(2, 2)), kind_of(nn.Conv2d(2, 2, 3)), kind_of(nn.ReLU())
    ('linear', 'conv', '')
    """
    if isinstance(module, nn.Linear) or is_conv1d_of_transformers(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else ""


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, parent, attribute) of every module, as if no wrapper were there. Shared modules come once."""
    seen: set[int] = set()

    def visit(parent: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, str]]:
        for attribute, child in list(parent.named_children()):
            name, bare = f"{prefix}{attribute}", unwrapped(child)
            if id(bare) not in seen:
                seen.add(id(bare))
                yield name, parent, attribute
                yield from visit(bare, f"{name}.")

    yield from visit(model, "")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module at the bottom of nested wrappers."""
    while isinstance(module, AdapterModule):
        module = module.base
    return module


def describe(model: nn.Module) -> ModelNames:
    """What targeting needs to know of a model. transformers is recognised by its methods, not imported."""
    kinds, parameters, heads = {}, [], []
    get_head = getattr(model, "get_output_embeddings", None)
    head = unwrapped(get_head()) if callable(get_head) and get_head() is not None else None
    for name, parent, attribute in walk(model):
        module = unwrapped(getattr(parent, attribute))
        kinds[name] = kind_of(module)
        heads += [name] if module is head else []
        parameters += [f"{name}.{p}" for p in module._parameters]
    parameters += [p for p in model._parameters]
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return ModelNames(kinds, tuple(parameters), model_type, tuple(heads))


def explain(model: nn.Module, config: LoraConfig) -> Targeting:
    """For every module: is it adapted, by which rule, with which r, alpha, s; and which rules matched nothing.

    The model is not changed. `print(explain(...))` is a table, `.to_dict()` the same for code.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> explain(net, LoraConfig(target_modules=["0"], exclude_modules=["2"])).to_dict()["modules"]["2"]["rule"]
    "exclude_modules '2'"
    """
    base = getattr(model, "get_base_model", lambda: model)()
    return targeting.resolve(describe(base), config)


def check(model: nn.Module, config: LoraConfig, plan: Targeting, will_init: bool = True) -> None:
    """Raise ValueError for all that injection could trip over, warn of what looks unintended. Changes nothing."""
    notes = targeting.check(plan, config)
    places = {name: (parent, attribute) for name, parent, attribute in walk(model)}
    shared: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(tensor), []).append(name)
    for match in plan.matches:
        if not match.action:
            continue
        name, parameter = match.name, ""
        if match.action == "adapt parameter":
            name, _, parameter = match.name.rpartition(".")
        if name not in places:
            raise ValueError(f"{match.name}: belongs to the model itself; only a submodule's parameters can be adapted")
        parent, attribute = places[name]
        module = getattr(parent, attribute)
        if match.action == "save":
            refusal = _refuse_saving(module)
        else:
            refusal = _refuse_adapting(module, parent, attribute, parameter, match.r or 0)
            if refusal is None and will_init:
                refusal = _refuse_init(config.init_lora_weights, match.r or 0, parameter, unwrapped(module))
        if refusal:
            raise ValueError(f"{match.name}: {refusal}")
        if match.action == "save":
            continue
        bare = unwrapped(module)
        transposed = is_conv1d_of_transformers(bare)
        if not parameter and kind_of(bare) == "linear" and config.fan_in_fan_out is not transposed and module is bare:
            stores = f"{type(bare).__name__} stores {'(in, out)' if transposed else '(out, in)'}"
            notes.append(f"fan_in_fan_out={config.fan_in_fan_out}, but {stores}: the layer's own storage is used")
        holders = shared[id(getattr(bare, parameter or "weight"))]
        if len(holders) > 1 and module is bare:  # a further adapter of a wrapped layer changes nothing
            notes.append(
                f"{match.name}: its weight is tied ({', '.join(holders)}); the adapter acts on {match.name} alone, "
                "and merging it ends the tie"
            )
    for note in dict.fromkeys(notes):
        warnings.warn(note, stacklevel=5)


def _refuse_saving(module: nn.Module) -> str | None:
    if any(isinstance(m, LoraLayer) for m in module.modules()):
        return "modules_to_save covers layers that another adapter adapts"
    return None


def _refuse_adapting(module: nn.Module, parent: nn.Module, attribute: str, parameter: str, r: int) -> str | None:
    """The reason why this module (or this parameter of it) cannot be adapted with rank r, or None."""
    bare: Any = unwrapped(module)
    kind = "parameter" if parameter else kind_of(bare)
    if not kind:
        return (
            f"{type(bare).__name__} cannot be adapted; Linear, Conv1D, Embedding, Conv1d, Conv2d and Conv3d can, "
            "and raw parameters with target_parameters"
        )
    if isinstance(parent, nn.MultiheadAttention):
        return (
            f"nn.MultiheadAttention reads {attribute}.weight without calling {attribute}, so an adapter on it would "
            "never run; leave it out with exclude_modules (target_parameters can adapt the attention's in_proj_weight)"
        )
    if isinstance(module, ModulesToSave):
        return "another adapter saves this module whole (modules_to_save)"
    if isinstance(module, LoraLayer) and isinstance(module, Parameter) is not bool(parameter):
        return "it would be adapted as a module and as a raw parameter at once; target one of them"
    weight = getattr(bare, parameter or "weight")
    if not weight.dtype.is_floating_point:
        return f"its weight is {weight.dtype}; quantised layers cannot be adapted"
    if parameter and weight.ndim not in (2, 3):
        return f"it has {weight.ndim} dimensions; a matrix (out, in) or a stack of them is needed"
    if kind == "embedding" and bare.max_norm is not None:
        return "an embedding with max_norm rewrites its rows as it looks them up, which an update cannot follow"
    if kind == "conv" and r % bare.groups:
        return f"r={r} must be divisible by the convolution's groups={bare.groups}"
    return None


def _refuse_init(init_lora_weights: bool | str, r: int, parameter: str, bare: nn.Module) -> str | None:
    try:
        method = inits.find(init_lora_weights, "parameter" if parameter else kind_of(bare))
    except ValueError as error:
        return str(error).removeprefix("this layer: ")
    if method is inits.orthogonal and r % 2:
        return f"init_lora_weights='orthogonal' needs an even rank, r={r} is odd"
    return None


def put_in(
    model: nn.Module,
    config: LoraConfig,
    plan: Targeting,
    adapter_name: str,
    init: Callable[[str], Init] | None = None,
    autocast_adapter_dtype: bool = True,
) -> None:
    """Give every targeted module its adapter, inactive and frozen; wrap it first where it is not wrapped yet.

    `init` gives the initialisation for a name, in place of the config's. Run `check` before, and
    this in a transaction.
    """
    places = {name: (parent, attribute) for name, parent, attribute in walk(model)}
    for match in plan.matches:
        if not match.action:
            continue
        is_parameter = match.action == "adapt parameter"
        name, _, parameter = match.name.rpartition(".") if is_parameter else (match.name, "", "")
        parent, attribute = places[name]
        module = getattr(parent, attribute)
        if match.action == "save":
            if not isinstance(module, ModulesToSave):
                module = ModulesToSave(module)
                setattr(parent, attribute, module)
            module.add_adapter(adapter_name)
            continue
        layer = _existing(module, parameter)
        if layer is None:
            layer = Parameter(module, parameter) if is_parameter else WRAPPERS[kind_of(module)](module)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # its fast path reads the weights of linear1 and linear2 itself, unless a hook is attached
                layer.register_forward_pre_hook(_keep_off_the_fast_path)
            setattr(parent, attribute, layer)
        assert match.r is not None and match.lora_alpha is not None
        method = init(match.name) if init else inits.find(config.init_lora_weights, layer.kind, match.name)
        layer.add_adapter(
            adapter_name,
            match.r,
            match.lora_alpha,
            config.use_rslora,
            config.lora_dropout if layer.kind != "embedding" else 0.0,
            method,
            autocast_adapter_dtype,
        )


def _existing(module: nn.Module, parameter: str) -> LoraLayer | None:
    """The wrapper that already adapts this module (or this parameter of it)."""
    while isinstance(module, LoraLayer):
        if not parameter or module.weight_name == parameter:
            return module
        module = module.base_layer
    return None


def _keep_off_the_fast_path(module: nn.Module, args: Any) -> None:
    """Nothing: its being there is what counts."""


def take_out(model: nn.Module) -> None:
    """Put every wrapped module back into its place; of modules saved whole, the one that answers now stays."""
    for _, parent, attribute in list(walk(model)):
        module = getattr(parent, attribute)
        if isinstance(module, ModulesToSave):
            setattr(parent, attribute, module.answering)
        elif isinstance(module, LoraLayer):
            setattr(parent, attribute, module.get_base_layer())
