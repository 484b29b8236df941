"""All reasons why a model cannot be adapted as asked, found before anything changes."""

import difflib
import inspect
import re
import warnings
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from ..core import inits
from ..core.adapter_modules import ModulesToSave, unwrapped, walk
from ..core.config import LoraConfig
from ..core.layer import LoraLayer, is_observed
from ..core.layer_types import Parameter, is_conv1d_of_transformers, kind_of
from ..core.names import Match, Targeting
from . import quantized
from .plain import check_not_sharded
from .strict import NoMatchingPeftModuleError, levels_to_the_caller
from .unreached import methods_of, own_forward, why_not


def refuse(
    model: nn.Module, config: LoraConfig, plan: Targeting, will_init: bool = True, needs_data: bool = True
) -> None:
    """Raise ValueError for what cannot be adapted as asked, and warn of what looks unintended. Changes nothing.

    will_init=False: the factors come from elsewhere. needs_data=False: the pass over data comes later.
    """
    stacks: dict[str, str] = {}
    places = {name: (parent, attribute) for name, parent, attribute in walk(model)}
    shared: dict[int, list[str]] = {}  # parameters that several modules own; a shared module is one owner
    owners = [("", model), *((name, unwrapped(getattr(parent, at))) for name, (parent, at) in places.items())]
    for name, owner in owners:
        for attribute, tensor in owner._parameters.items():
            shared.setdefault(id(tensor), []).append(f"{name}.{attribute}".lstrip("."))
            if attribute in STACKS and isinstance(tensor, Tensor) and tensor.ndim == 3:
                stacks[attribute] = f"{name}.{attribute}"
            if type(tensor) not in (Tensor, nn.Parameter, type(None)):
                check_not_sharded(model, "adding an adapter")
    notes = (fused_experts(stacks, config, plan) if stacks else []) + unused_rules(plan, config)
    hooked = [f"{name}." for name, owner in owners if name and is_observed(owner)]
    nested = any(isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor for _, m in owners)
    for match in plan.matches:
        if not match.action:
            continue
        name, parameter = match.place()
        if name not in places:
            raise ValueError(f"{match.name}: belongs to the model itself; only a submodule's parameters can be adapted")
        parent, attribute = places[name]
        module = getattr(parent, attribute)
        bare = unwrapped(module)
        if match.action == "save":
            refusal = _refuse_saving(module, parent, attribute)
        else:
            weight = getattr(bare, parameter or "weight", None)
            offloaded = getattr(weight, "is_meta", False) and any(f"{name}.".startswith(prefix) for prefix in hooked)
            refusal = "its weight is offloaded: add the adapter before" if offloaded else None
            refusal = refusal or _refuse_adapting(module, parent, attribute, parameter, match.r or 0)
            refusal = refusal or (_refuse_twice(name, plan) if parameter else None)
            refusal = refusal or (_refuse_init(config, match, parameter, bare, needs_data) if will_init else None)
        if refusal:
            raise ValueError(f"{match.name}: {refusal}")
        if nested and isinstance(parent, nn.TransformerEncoderLayer):
            masks = "nn.TransformerEncoder cannot take padding masks in eval mode once its layers are adapted"
            notes.append(f"{masks}: make it with enable_nested_tensor=False")
        if match.action == "save":
            inside = {id(p) for p in bare.parameters()}
            twins = [name for p in inside for name in shared.get(p, []) if not f"{name}.".startswith(f"{match.name}.")]
            if twins and module is bare:
                notes.append(f"{match.name}: its weight is tied to {', '.join(twins)}; the copy that trains is not")
            continue
        transposed, is_linear = is_conv1d_of_transformers(bare), kind_of(bare) == "linear" and not parameter
        if is_linear and config.fan_in_fan_out is not transposed and module is bare:
            stores = f"{type(bare).__name__} stores {'(in, out)' if transposed else '(out, in)'}"
            notes.append(f"fan_in_fan_out={config.fan_in_fan_out}, but {stores}: the layer's own storage is used")
        weight = getattr(bare, "weight", None) if is_linear else None
        plain = type(weight) is nn.Parameter and weight.dtype in quantized.PLAIN
        packed = is_linear and not plain and quantized.is_quantized(bare)
        if packed and module is bare and not quantized.passes_gradient(bare):
            cut = f"{match.name}: its {quantized.kind(bare.weight)} passes no gradient to its input"
            notes.append(f"{cut}: adapters before it train wrongly, or not at all; quantise the weights alone")
        holders = shared[id(getattr(bare, parameter or "weight"))]
        if is_linear and type(bare) is not nn.Linear and own_forward(bare) and not packed:
            own = f"{match.name}: {type(bare).__name__} has a forward of its own"
            notes.append(f"{own}; the update is that of a plain nn.Linear, and merged and unmerged outputs may differ")
        if len(holders) > 1 and module is bare:  # a further adapter of a wrapped layer changes nothing
            tied = f"{match.name}: its weight is tied ({', '.join(holders)})"
            notes.append(f"{tied}; the adapter acts on {match.name} alone, and merging it ends the tie")
    for note in dict.fromkeys(notes):
        warnings.warn(note, stacklevel=levels_to_the_caller())


CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)


# where the experts of transformers 5 have what its modules were called before
FUSED = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
STACKS = frozenset(FUSED.values())


def fused_experts(stacks: dict[str, str], config: LoraConfig, plan: Targeting) -> list[str]:
    """The warning about targets that mean experts, but reach only dense layers of the same name.

    `stacks` is {name without its path: name} of the raw parameters of experts.
    Raises: ValueError: such targets reach nothing.
    """
    given = {last(name) for name in config.target_parameters or []}
    targets, reached = config.target_modules, {last(name) for name in plan.names("adapt")}
    items = plan.unused.get("target_modules", [])
    if isinstance(targets, str):  # the words of a pattern that reach nothing
        items = [word for word in re.findall(r"\w+", targets) if word not in reached]
    missed = [item for item in items if FUSED.get(last(item), "") in stacks.keys() - given]
    if missed:
        wanted = sorted({FUSED[last(item)] for item in missed})
        where = f"the experts are fused into raw parameters ({stacks[wanted[0]]})"
        both = ". One pair of factors serves gate and up: for the room of two, double its r and lora_alpha"
        way = f"take these out, and give target_parameters={wanted}{both if 'gate_up_proj' in wanted else ''}"
        raise ValueError(f"target_modules={missed}: {where}: {way}")
    dense = [name for name in plan.names("adapt") if FUSED.get(last(name), "") in stacks]
    if not dense:
        return []
    stack = stacks[FUSED[last(dense[0])]]
    note = f"{dense[0]}: this layer is dense; {stack} is not adapted by target_modules (target_parameters can)"
    way = f"exclude_modules={sorted({last(name) for name in dense})} leaves them out"
    return [f"{note}. In some models PEFT 0.21 takes such layers for experts, and misreads the saved folder: {way}"]


def last(name: str) -> str:
    """The last part of a dotted name."""
    return name.rpartition(".")[2]


def _refuse_saving(module: nn.Module, parent: nn.Module, attribute: str) -> str | None:
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight without calling it: save the attention whole"
    if any(isinstance(m, LoraLayer) for m in module.modules()):
        return "modules_to_save covers layers that another adapter adapts"
    bare = unwrapped(module)
    if any(map(quantized.is_quantized, module.modules())):
        return f"it has a quantised weight, which cannot train in full; {quantized.WAY}, or adapt it (target_modules)"
    if isinstance(bare, CONTAINERS) and type(bare).forward in [cls.forward for cls in CONTAINERS]:
        return f"a {type(bare).__name__} is not called, so no copy can take its place: save the modules in it"
    if isinstance(bare, nn.Sequential) and _indexes(parent, attribute):
        return f"{type(parent).__name__} indexes this {type(bare).__name__}: save the modules in it"
    return None


def _indexes(parent: nn.Module, attribute: str) -> bool:
    """Does the source of the parent's methods index a child, or iterate over it, in place of calling it?"""
    source = ""
    for method in methods_of(type(parent)):
        with suppress(OSError, TypeError):  # made without a file
            source += inspect.getsource(method)
    own = rf"self\.{re.escape(attribute)}\b"
    return re.search(rf"{own}\[|\bin {own}\s*[:\])]|\b(?:enumerate|zip|len|iter|reversed)\({own}", source) is not None


def _refuse_adapting(module: nn.Module, parent: nn.Module, attribute: str, parameter: str, r: int) -> str | None:
    """The reason why this module (or this parameter of it) cannot be adapted with rank r, or None."""
    bare: Any = unwrapped(module)
    kind = "parameter" if parameter else kind_of(bare)
    if not kind:
        can = "Linear, Conv1D, Embedding, Conv1d, Conv2d and Conv3d can, and raw parameters with target_parameters"
        return f"{type(bare).__name__} cannot be adapted; {can}"
    torchs = type(parent).__module__ == nn.Sequential.__module__  # most of torch's own modules need no look
    suspect = type(bare) is not nn.Linear or not torchs
    if reason := why_not(module, parent, attribute) if suspect and not parameter else None:
        return reason
    if isinstance(module, ModulesToSave):
        return "another adapter saves this module whole (modules_to_save)"
    if isinstance(module, LoraLayer) and isinstance(module, Parameter) is not bool(parameter):
        return "it would be adapted as a module and as a raw parameter at once; target one of them"
    if kind in ("embedding", "conv") and own_forward(bare) and not hasattr(bare, "embed_scale"):
        return f"{type(bare).__name__} computes its output in a forward of its own, which an update cannot follow"
    if (parameter or "weight") not in bare._parameters:
        return "its weight is computed from other parameters (a parametrisation); remove that first"
    weight = getattr(bare, parameter or "weight")
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in quantized.PLAIN
    if not plain and not parameter and quantized.is_quantized(bare):
        return quantized.why_untrainable(bare)
    if not weight.dtype.is_floating_point or type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {quantized.kind(weight)}; only linear layers can be adapted when they are quantised"
    if parameter and weight.ndim not in (2, 3):
        return f"it has {weight.ndim} dimensions; a matrix (out, in) or a stack of them is needed"
    if kind == "embedding" and bare.max_norm is not None:
        return "an embedding with max_norm rewrites its rows as it looks them up, which an update cannot follow"
    if kind == "conv" and r % bare.groups:
        return f"r={r} must be divisible by the convolution's groups={bare.groups}"
    return None


def _refuse_twice(owner: str, plan: Targeting) -> str | None:
    """The reason why the same configuration cannot adapt a parameter of this module as well, or None."""
    if owner in plan.names("adapt"):
        return "it would be adapted as a module and as a raw parameter at once; target one of them"
    if any(f"{owner}.".startswith(f"{saved}.") for saved in plan.names("save")):
        return "it belongs to a module that is saved whole (modules_to_save)"
    return None


def _refuse_init(config: LoraConfig, match: Match, parameter: str, bare: nn.Module, needs_data: bool) -> str | None:
    """The reason why this layer cannot be initialised as asked, or None."""
    weight, value = getattr(bare, parameter or "weight"), config.init_lora_weights
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in quantized.PLAIN
    packed = not plain and not parameter and quantized.is_quantized(bare)
    weight = quantized.stand_in(bare) if packed else weight
    name = inits.method_of(value)
    method = inits.METHODS[name]
    assert match.r is not None and match.scaling is not None
    kind = "parameter" if parameter else kind_of(bare)
    if kind not in method.kinds:
        there_is = ", ".join(repr(name) for name, other in inits.METHODS.items() if kind in other.kinds)
        return f"init_lora_weights={value!r} is not available for {kind} layers; use {there_is}, or exclude the layer"
    try:
        if method.check:
            method.check(weight.shape, match.r, match.scaling)
    except ValueError as error:
        return str(error)
    if needs_data and method.prepare and name not in vars(bare).get("prepared_init", {}):
        return f"init_lora_weights={value!r} needs data: call {method.prepare} on the model first"
    if packed and method.reads_weight:
        helper = "; or take True, and call replace_lora_weights_loftq" if name == "loftq" else ""
        return f"init_lora_weights={value!r} reads the weight, which is quantised: {quantized.WAY}{helper}"
    if weight.is_meta and method.reads_weight:
        return f"init_lora_weights={value!r} looks at the weight, which has no numbers yet (it is on the meta device)"
    return None


def unused_rules(targeting: Targeting, config: LoraConfig) -> list[str]:
    """The warnings about rules that matched nothing.

    Raises: ValueError: nothing is adapted; says which rule excluded what, and lists similar names.
    """
    if not any(m.action.startswith("adapt") for m in targeting.matches):
        excluded = [m for m in targeting.matches if m.rule != "no target matches"]
        known = [m.name for m in targeting.matches]
        asked = config.target_modules or config.target_parameters or []
        ends = {name.rpartition(".")[2] for name in known}
        words = [asked] if isinstance(asked, str) else asked[:50]
        similar = sorted({name for word in words for name in difflib.get_close_matches(word, ends)})
        raise NoMatchingPeftModuleError(
            f"nothing to adapt: target_modules={_cut(repr(config.target_modules))}, target_parameters="
            f"{_cut(repr(config.target_parameters))} match none of the model's {len(known)} modules"
            + "".join(f"; {m.name}: {m.rule}" for m in excluded[:5])
            + (f"; near names: {', '.join(similar)}" if similar else f"; the model has: {', '.join(known[:8])}")
            + ("" if known else "only itself: wrap it, as in nn.Sequential(model), and target '0'")
            + ("; a string is a regular expression for the WHOLE name" if isinstance(asked, str) else "")
        )
    hint = " among the adapted modules (a key must reach the end of the name)"
    return [
        f"{option}: {_cut(', '.join(map(repr, items)))} matched nothing{hint if option.endswith('_pattern') else ''}"
        for option, items in targeting.unused.items()
    ]


def _cut(text: str) -> str:
    """Lists from a file may be long; a message should not be."""
    return text if len(text) <= 1000 else f"{text[:1000]}..."
