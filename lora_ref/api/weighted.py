"""`add_weighted_adapter`: the factors of several adapters, layer by layer, into those of a new one."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

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
from . import sparse
from .combination import COMBINATIONS

Layers = Mapping[str, LoraLayer]


def add_weighted_adapter(
    model: LoraModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """A new adapter, inactive, with the weighted sum of the updates of others: see `lora_ref.api.combination`.

    Its scaling is 1, its init a plain one. The base weights do not change.

    Args:
        combination_type: "cat" (exact, rank = the sum of ranks), "svd" (the best at svd_rank, by default
            the largest rank of the parents) or "linear" (the factors are added; equal ranks needed). "ties",
            "dare_linear", "dare_ties" and "magnitude_prune" merge parts of the factors, see `lora_ref.api.sparse`; with
            "_svd" at their end, parts of the updates.
        density: the share of the entries that these keep, in (0, 1].
        majority_sign_method: "total" or "frequency", for the kinds with "ties".
        svd_full_matrices, svd_driver: for PEFT's scripts. They change no result.
    Raises: ValueError: unknown adapters, not one weight each, unequal ranks ("linear"), parents that save one module,
        a density that is missing or not in (0, 1], svd_clamp.
    """
    if svd_clamp is not None:
        raise ValueError(
            f"svd_clamp={svd_clamp!r} is not supported: it would cut off the largest entries; leave it out"
        )
    model._check_new_name(adapter_name)
    model._check_known(*adapters)
    parents = {name: model.peft_config[name] for name in adapters}
    layers = model.lora_layers()
    check_plain(layers, adapters, base=False)
    combined = combine(layers, adapters, weights, combination_type, svd_rank, density, majority_sign_method)
    config = configure(layers, combined, list(parents.values()), describe(model.model).kinds)

    def init(name: str) -> Init:
        A, B, *_ = combined[name]
        if layers[name].kind == "conv":  # groups are stored one after the other
            A, B = A.flatten(0, -2), B.flatten(0, -2)
        return lambda weight, r, scaling: Factors(A, B)

    with transaction(model):
        model.add_adapter(adapter_name, config, init=init)
        for wrapper in model.adapter_wrappers():
            if isinstance(wrapper, ModulesToSave) and adapter_name in wrapper.adapters():
                parent = next(name for name in parents if name in wrapper.adapters())
                wrapper.modules_to_save[adapter_name].load_state_dict(wrapper.modules_to_save[parent].state_dict())


def combine(
    layers: Layers,
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str = "svd",
    svd_rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> dict[str, Factors]:
    """{layer: A and B of the combination}, over the layers in which any of the adapters has a part.

    Raises: ValueError: unknown combination_type, not as many weights as adapters, a weight that is not finite, unequal
    ranks with "linear", a result that is not finite, or an svd_rank that the groups of a convolution cannot share out.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"{len(adapters)} adapters and {len(weights)} weights: there must be as many, at least one")
    known, kind = [*COMBINATIONS, *sparse.KINDS, *(f"{name}_svd" for name in sparse.KINDS)], combination_type
    if kind not in known:
        raise ValueError(f"combination_type={kind!r}: must be one of {', '.join(known)}")
    by_svd, is_sparse = kind.endswith("svd"), kind not in COMBINATIONS
    if is_sparse and (type(density) not in (int, float) or not 0 < density <= 1):  # type: ignore[operator]
        raise ValueError(f"density={density!r}: combination_type={kind!r} needs a number above 0 and at most 1")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method={majority_sign_method!r}: must be 'total' or 'frequency'")
    options: dict[str, Any] = {"density": density, "majority_sign_method": majority_sign_method}
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
        ws, scalings = [w for _, w in parents], [layer.scaling[name] for name, _ in parents]
        scales = [w * s for w, s in zip(ws, scalings, strict=True)]
        if by_svd and (svd_rank or largest) % layer.groups:
            raise ValueError(f"{where}: svd_rank={svd_rank or largest} must be divisible by groups={layer.groups}")
        rank = {"r": (svd_rank or largest) // layer.groups} if by_svd else {}
        with prefix_errors(where):
            if not is_sparse:
                combined[where] = COMBINATIONS[kind](As, Bs, scales, **rank)
            elif by_svd:
                combined[where] = sparse.of_updates(As, Bs, scalings, ws, kind.removesuffix("_svd"), **rank, **options)
            else:
                combined[where] = sparse.of_factors(As, Bs, scales, kind, **options)
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
    whole = [module for config in parents for module in dict.fromkeys(config.modules_to_save or [])]
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
