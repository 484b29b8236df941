"""From names to layers: look at a model, decide what is adapted, put the layers in."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..safe import progress
from . import inits, targeting
from .adapter_modules import AdapterModule, ModulesToSave, frame, unwrapped
from .config import LoraConfig
from .layer import Init, LoraLayer
from .layer_types import Conv, Embedding, Linear, is_conv1d_of_transformers
from .parameters import Parameter
from .targeting import ModelNames, Targeting

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
    waiting = [(attribute, model, attribute) for attribute in reversed(model._modules)]
    while waiting:
        name, parent, attribute = waiting.pop()
        child = parent._modules[attribute]
        bare = None if child is None else unwrapped(child)
        if bare is not None and id(bare) not in seen:
            seen.add(id(bare))
            yield name, parent, attribute
            waiting += [(f"{name}.{inner}", bare, inner) for inner in reversed(bare._modules)]


def holders(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """{id of a module, wrapped or not: every (parent, attribute) that holds it}: a shared module has several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in frame(model):
        for attribute, child in parent._modules.items() if not isinstance(parent, AdapterModule) else ():
            if child is not None:
                found.setdefault(id(unwrapped(child)), []).append((parent, attribute))
    return found


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


def put_in(
    model: nn.Module,
    config: LoraConfig,
    plan: Targeting,
    adapter_name: str,
    init: Callable[[str], Init] | None = None,
    autocast_adapter_dtype: bool = True,
) -> list[LoraLayer]:
    """Give every targeted module its adapter, inactive and frozen; wrap it first where it is not wrapped yet.

    `init` gives the initialisation for a name, in place of the config's. Run `check` before, and
    this in a transaction. Returns the adapted layers.
    """
    places = {name: (parent, attribute) for name, parent, attribute in walk(model)}
    held, adapted = holders(model), []

    def put(wrapper: AdapterModule, module: nn.Module) -> None:
        for parent, attribute in held[id(unwrapped(module))]:
            setattr(parent, attribute, wrapper)
            if isinstance(parent, nn.TransformerEncoderLayer):
                # its fast path reads the weights of linear1 and linear2 itself, unless a hook is attached
                wrapper.register_forward_pre_hook(_keep_off_the_fast_path)

    todo = [match for match in plan.matches if match.action]
    decomposes = init is None and inits.METHODS[inits.method_of(config.init_lora_weights)].reads_weight
    with progress.steps(todo, f"init_lora_weights={config.init_lora_weights!r}", show=decomposes) as matches:
        for match in matches:
            is_parameter = match.action == "adapt parameter"
            name, _, parameter = match.name.rpartition(".") if is_parameter else (match.name, "", "")
            parent, attribute = places[name]
            module = getattr(parent, attribute)
            if match.action == "save":
                if not isinstance(module, ModulesToSave):
                    put(module := ModulesToSave(module), module.base)
                module.add_adapter(adapter_name)
                continue
            layer = _existing(module, parameter)
            if layer is None:
                layer = Parameter(module, parameter) if is_parameter else WRAPPERS[kind_of(module)](module)
                put(layer, module)
            assert match.r is not None and match.lora_alpha is not None
            try:
                layer.add_adapter(
                    adapter_name,
                    match.r,
                    match.lora_alpha,
                    config.use_rslora,
                    config.lora_dropout if layer.kind != "embedding" else 0.0,
                    init(match.name) if init else _method(config, layer),
                    autocast_adapter_dtype,
                    train_B=config.init_lora_weights != "mica",
                    rounded=init is None,
                )
            except ValueError as error:
                raise ValueError(f"{match.name}: {error}") from error
            adapted.append(layer)
    return adapted


def prepared(module: nn.Module) -> dict[str, Init]:
    """The initialisations that a pass over data has left on a module: {method: function}."""
    return vars(module).get("prepared_init", {})


def _method(config: LoraConfig, layer: LoraLayer) -> Init:
    """The initialisation that the configuration asks for."""
    value, ready = config.init_lora_weights, prepared(layer.get_base_layer())
    if isinstance(value, str) and value in ready:
        return ready.pop(value)  # it belongs to the weight as it was: of no use a second time
    of_config = inits.METHODS[inits.method_of(value)].options
    options = of_config(config) if of_config else {}
    return inits.find(value, layer.kind, **options)


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
    for places in holders(model).values():
        for parent, attribute in places:
            module = getattr(parent, attribute)
            if isinstance(module, ModulesToSave):
                setattr(parent, attribute, module.answering)
            elif isinstance(module, LoraLayer):
                setattr(parent, attribute, module.get_base_layer())
