"""An adapter whose initialisation changed the base weight, as one for the ORIGINAL base weight.

    W + s B A - s B0 A0  =  W + s [B | -B0] [A; A0]        a plain adapter of twice the rank

PiSSA, OLoRA, CorDA and LoRA-GA start from W - s B0 A0; a file with A and B alone would be wrong on W.
LoftQ's base is a quantised W, no low-rank change: there the quantised weight goes into the file.
"""

import dataclasses
import math
from typing import Any

from torch import Tensor

from ..core.config import LoraConfig
from ..core.layer import LoraLayer
from ..core.model import LoraModel
from .adapter_tensors import PREFIX, wrappers


def convert(model: LoraModel, adapter_name: str, tensors: dict[str, Tensor]) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter's file, such that it fits the original base model.

    s stays what it is in every layer, since every rank is doubled, and every alpha too (with rsLoRA
    multiplied by sqrt(2)). An adapter that left the base weight alone comes back as it is.

    Source: PiSSA, arXiv 2404.02948, its conversion to LoRA; PEFT's
    `save_pretrained(path_initial_model_for_weight_conversion=...)`.
    Differs from PEFT: the initial factors are at hand, so no folder of them is needed, and rank_pattern or
        alpha_pattern together with rsLoRA work.
    """
    config = dataclasses.replace(model.peft_config[adapter_name], inference_mode=True)
    changed = {
        name: layer
        for name, layer in wrappers(model, adapter_name)
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_taken
    }
    if not changed:
        return config, tensors
    tensors = dict(tensors)
    plain: dict[str, Any] = {
        "init_lora_weights": True,
        "loftq_config": None,
        "corda_config": None,
        "lora_ga_config": None,
    }
    if any(layer.lora_taken[adapter_name].D is not None for layer in changed.values()):
        for name, layer in changed.items():
            tensors[f"{PREFIX}{name}.base_layer.{layer.weight_name}"] = layer.left_by(adapter_name)
        return dataclasses.replace(config, **plain), tensors
    for name, layer in changed.items():
        A, B = layer.converted(adapter_name, layer.initial_scaling[adapter_name])
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
