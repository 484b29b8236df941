"""lora_ref: LoRA as a small reference on NumPy and PyTorch, with PEFT's names and files.

`core` is a LoRA of its own; the other rooms are around it (`tutorials/reading_order.md`). Pure functions on arrays are
importable without torch: `core.scaling`, `core.update`, `core.inits`, `core.names`, `init`, `numerics`,
`api.combination`. The public names below import torch when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import init as init  # enters its methods into the table of core.inits
from .files.config_file import LoraConfig
from .files.config_file import LoraConfig as PeftConfig
from .init.options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from .safe.strict import TaskType

if TYPE_CHECKING:
    from .api.explain import explain
    from .api.model import LoraModel
    from .api.peft_model import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from .calibration.eva import initialize_lora_eva_weights
    from .calibration.preprocess import preprocess_corda, preprocess_loraga
    from .core.layer import LoraLayer

__version__ = "0.1.0"

_WITH_TORCH = {
    "LoraLayer": "core.layer",
    "LoraModel": "api.model",
    "PeftModel": "api.peft_model",
    "explain": "api.explain",
    "get_peft_model": "api.peft_model",
    "get_peft_model_state_dict": "api.peft_model",
    "initialize_lora_eva_weights": "calibration.eva",
    "preprocess_corda": "calibration.preprocess",
    "preprocess_loraga": "calibration.preprocess",
    "set_peft_model_state_dict": "api.peft_model",
}

# fmt: off
__all__ = [
    "CordaConfig", "EvaConfig", "LoftQConfig", "LoraConfig", "LoraGAConfig", "LoraLayer", "LoraModel", "PeftConfig",
    "PeftModel", "TaskType", "explain", "get_peft_model", "get_peft_model_state_dict", "initialize_lora_eva_weights",
    "preprocess_corda", "preprocess_loraga", "set_peft_model_state_dict",
]
# fmt: on


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WITH_TORCH[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
