"""`add_weighted_adapter`: the factors of several adapters, layer by layer, into those of a new one."""

import math
import re
from collections.abc import Collection, Mapping, Sequence

from .. import numerics
from ..core import config as core
from ..core.adapter_modules import ModulesToSave
from ..core.layer import Init, LoraLayer
from ..core.model import LoraModel, describe
from ..core.names import exactly
from ..core.scaling import check_rank
from ..core.update import Factors, at_least_float32
from ..files.config_file import LoraConfig
from ..files.conversion import plain_factors
from ..safe.atomic import transaction
from ..safe.plain import check_plain
from ..safe.strict import prefix_errors
from .combination import COMBINATIONS

Layers = Mapping[str, LoraLayer]


def add_weighted_adapter(
    model: LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> None:
    """A new adapter, inactive, with the weighted sum of the updates of others: see `lora_ref.api.combination`.

    Its scaling is 1, its init a plain one. The base weights do not change.

    Args:
        combination_type: "cat" (exact, rank = the sum of ranks), "svd" (the best at svd_rank, by default
            the largest rank of the parents) or "linear" (the factors are added; equal ranks needed).
    Raises: ValueError: unknown adapters, not one weight each, unequal ranks ("linear"), parents that save one module.
    """
    model._check_new_name(adapter_name)
    model._check_known(*adapters)
    parents = {name: model.peft_config[name] for name in adapters}
    layers = model.layers()
    check_plain(layers, adapters, base=False)
    combined = combine(layers, adapters, weights, combination_type, svd_rank)
    config = configure(layers, combined, list(parents.values()), describe(model.model).kinds)

    def init(name: str) -> Init:
        A, B, *_ = combined[name]
        if layers[name].kind == "conv":  # groups are stored one after the other
            A, B = A.flatten(0, -2), B.flatten(0, -2)
        return lambda weight, r, scaling: Factors(A, B)

    with transaction(model):
        model.add_adapter(adapter_name, config, init=init)
        for wrapper in model.wrappers():
            if isinstance(wrapper, ModulesToSave) and adapter_name in wrapper.adapters():
                parent = next(name for name in parents if name in wrapper.adapters())
                wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[parent].state_dict())


def combine(
    layers: Layers,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> dict[str, Factors]:
    """{layer: A and B of the combination}, over the layers in which any of the adapters has a part.

    Raises: ValueError: unknown combination_type, not as many weights as adapters, a weight that is not finite, unequal
    ranks with "linear", a result that is not finite, or an svd_rank that the groups of a convolution cannot share out.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: there must be as many, at least one")
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type={combination_type!r}: must be one of {', '.join(COMBINATIONS)}")
    if svd_rank is not None:
        check_rank(svd_rank, "svd_rank")
    if not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights={list(weights)}: must be finite")
    combined = {}
    both = [(layer, name) for layer in layers.values() for name in adapters if name in layer.r]
    largest = max((layer.r[name] * (2 if layer.part("lora_initial", name) else 1) for layer, name in both), default=0)
    for where, layer in layers.items():
        parents = [(name, w) for name, w in zip(adapters, weights, strict=True) if name in layer.adapters()]
        if not parents:
            continue
        pairs = [plain_factors(layer, name, layer.scaling[name]) for name, _ in parents]
        As, Bs = zip(*(map(at_least_float32, pair) for pair in pairs), strict=True)
        scales = [w * layer.scaling[name] for name, w in parents]
        if combination_type == "svd" and (svd_rank or largest) % layer.groups:
            raise ValueError(f"{where}: svd_rank={svd_rank or largest} must be divisible by groups={layer.groups}")
        rank = {"r": (svd_rank or largest) // layer.groups} if combination_type == "svd" else {}
        with prefix_errors(where):
            combined[where] = COMBINATIONS[combination_type](As, Bs, scales, **rank)
            if not all(f.is_meta or numerics.is_finite(f) for f in combined[where][:2]):
                raise ValueError(f"with weights={list(weights)} the combined factors are not finite")
    return combined


def configure(
    layers: Layers, combined: Mapping[str, Factors], parents: Sequence[core.LoraConfig], modules: Collection[str]
) -> LoraConfig:
    """The configuration of the combination: lora_alpha = r in every layer, so that s = 1; a plain init.

    `modules` names all modules of the model, for the targets to match none of the others.
    Raises: ValueError: two parents save the same module whole.
    """
    whole = [module for config in parents for module in config.modules_to_save or []]
    twice = sorted({module for module in whole if whole.count(module) > 1})
    if twice:
        raise ValueError(f"more than one of the adapters saves {', '.join(twice)} whole: they cannot be combined")
    ranks = {name: factors.A.shape[-2] * layers[name].groups for name, factors in combined.items()}
    r = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    parameters = [name for name in combined if layers[name].kind == "parameter"]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=exactly([name for name in combined if layers[name].kind != "parameter"], modules),
        target_parameters=parameters or None,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=whole or None,
        lora_dropout=0.0 if parameters else parents[0].lora_dropout,
        task_type=parents[0].task_type,
        base_model_name_or_path=parents[0].base_model_name_or_path,
    )
