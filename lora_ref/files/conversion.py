"""An adapter that subtracts its initial update, as a plain one for the base weight.

    W + s B A - s B0 A0  =  W + s [B | -B0] [A; A0]        a plain adapter of twice the rank

PiSSA, OLoRA, CorDA and LoRA-GA subtract s B0 A0. A file with A and B alone would be wrong on W. LoftQ's D0 has full
rank, so there the quantised weight W - D0 goes into the file.
"""

import dataclasses
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.config import LoraConfig
from ..core.layer import LoraLayer
from ..core.model import LoraModel
from ..safe.plain import gathered
from .adapter_tensors import PREFIX, layers_in_file


def plain_factors(
    layer: LoraLayer, name: str, s: float
) -> tuple[Float[Tensor, "*batch q in"], Float[Tensor, "*batch out q"]]:
    """A and B such that s B A is the update of the base weight: [A; A0] and [B | -s0/s B0], of twice the rank, where
    the adapter subtracts s0 B0 A0; else the factors as they are.

    Raises: ValueError: D0 is of full rank (LoftQ), or s = 0.
    """
    A, B = (gathered(factor.detach()) for factor in layer.factors(name))
    initial = layer.part("lora_initial", name)
    if initial is None:
        return A, B
    if initial.A is None:
        raise ValueError(f"adapter {name!r} works on a quantised base weight: it is no update of the original one")
    if s == 0:
        raise ValueError(f"adapter {name!r} has scaling 0: give it another one")
    return torch.cat([A, initial.A.to(A)]), torch.cat([B, -(initial.scaling / s) * initial.B.to(B)], dim=1)


def convert(model: LoraModel, adapter_name: str, tensors: dict[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter's file, such that it fits the original base model.

    Ranks and alphas are doubled (with rsLoRA alphas times sqrt(2)), so s stays. Without a D0 nothing changes.
    Source: PiSSA, arXiv 2404.02948, its conversion to LoRA; PEFT's
    `save_pretrained(path_initial_model_for_weight_conversion=...)`.
    Differs from PEFT: the initial factors are at hand, so no folder of them is needed, and rank_pattern or
    alpha_pattern together with rsLoRA work.
    """
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    layers = layers_in_file(model, adapter_name).items()
    changed = {name: layer for name, layer in layers if layer.part("lora_initial", adapter_name) is not None}
    if not changed:
        return config, tensors
    tensors = dict(tensors)
    plain: Any = {"init_lora_weights": True, **dict.fromkeys(("loftq_config", "corda_config", "lora_ga_config"))}
    if any(layer.part("lora_initial", adapter_name).A is None for layer in changed.values()):
        for name, layer in changed.items():
            residual = layer.stored(layer.residual(adapter_name))
            tensors[f"{PREFIX}{name}.base_layer.{layer.weight_name}"] = residual
        return dataclasses.replace(config, **plain), tensors
    for name, layer in changed.items():
        A, B = plain_factors(layer, adapter_name, layer.initial_scaling[adapter_name])
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
    factor = math.sqrt(2) if config.use_rslora else 2
    doubled = dataclasses.replace(
        config,
        r=2 * config.r,
        lora_alpha=factor * config.lora_alpha,
        rank_pattern={key: 2 * r for key, r in config.rank_pattern.items()},
        alpha_pattern={key: factor * alpha for key, alpha in config.alpha_pattern.items()},
        **plain,
    )
    return doubled, tensors
