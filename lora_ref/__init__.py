"""lora_ref: LoRA as a small reference on NumPy and PyTorch, with PEFT's names and files.

`core` is a LoRA of its own; the other rooms are around it (`tutorials/reading_order.md`). Pure functions on arrays are
importable without torch: `core.scaling`, `core.update`, `core.inits`, `core.names`, `init`, `numerics`,
`api.combination`. The public names below import torch when they are first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import init as init  # enters its methods into the table of core.inits
from .files.config_file import LoraConfig
from .files.config_file import LoraConfig as PeftConfig
from .init.options import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig
from .safe.strict import NoMatchingPeftModuleError, PeftError, PeftType, TaskType

if TYPE_CHECKING:
    from .api.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .api.explain import explain
    from .api.helpers import (
        cast_mixed_precision_params,
        check_if_peft_model,
        create_loraplus_optimizer,
        disable_input_dtype_casting,
        rescale_adapter_scale,
    )
    from .api.hotswap import hotswap_adapter
    from .api.inject import inject_adapter_in_model
    from .api.model import LoraModel
    from .api.peft_model import (
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        get_peft_model,
    )
    from .api.quantized import prepare_model_for_kbit_training, replace_lora_weights_loftq
    from .api.state_dict import (
        get_base_model_state_dict,
        get_peft_model_state_dict,
        load_peft_weights,
        set_base_model_state_dict,
        set_peft_model_state_dict,
    )
    from .api.status import get_layer_status, get_model_status
    from .calibration.eva import get_eva_state_dict, initialize_lora_eva_weights
    from .calibration.preprocess import preprocess_corda, preprocess_loraga
    from .core.layer import LoraLayer

__version__ = "0.1.0"

# {module: its public names}; they import torch
_WITH_TORCH = {
    "api.auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction "
        "AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification "
        "AutoPeftModelForTokenClassification"
    ),
    "api.explain": "explain",
    "api.helpers": (
        "cast_mixed_precision_params check_if_peft_model create_loraplus_optimizer disable_input_dtype_casting "
        "rescale_adapter_scale"
    ),
    "api.hotswap": "hotswap_adapter",
    "api.inject": "inject_adapter_in_model",
    "api.model": "LoraModel",
    "api.peft_model": (
        "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification "
        "get_peft_model"
    ),
    "api.quantized": "prepare_model_for_kbit_training replace_lora_weights_loftq",
    "api.state_dict": (
        "get_base_model_state_dict get_peft_model_state_dict load_peft_weights "
        "set_base_model_state_dict set_peft_model_state_dict"
    ),
    "api.status": "get_layer_status get_model_status",
    "calibration.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "calibration.preprocess": "preprocess_corda preprocess_loraga",
    "core.layer": "LoraLayer",
}
_MODULE_OF = {name: module for module, names in _WITH_TORCH.items() for name in names.split()}

# fmt: off
__all__ = [
    "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification", "CordaConfig", "EvaConfig", "LoftQConfig", "LoraConfig", "LoraGAConfig",
    "LoraLayer", "LoraModel", "NoMatchingPeftModuleError", "PeftConfig", "PeftError", "PeftModel",
    "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftType", "TaskType",
    "cast_mixed_precision_params", "check_if_peft_model", "create_loraplus_optimizer", "disable_input_dtype_casting",
    "explain", "get_base_model_state_dict", "get_eva_state_dict", "get_layer_status", "get_model_status",
    "get_peft_model", "get_peft_model_state_dict", "hotswap_adapter", "initialize_lora_eva_weights",
    "inject_adapter_in_model", "load_peft_weights", "prepare_model_for_kbit_training", "preprocess_corda",
    "preprocess_loraga", "replace_lora_weights_loftq", "rescale_adapter_scale", "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
# fmt: on


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for."""
    if name in globals() and name in __all__:
        return globals()[name]
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)


# {name in PEFT's modules: what it is here}
_ELSEWHERE = {
    "BaseTunerLayer": ("core.layer", "LoraLayer"),
    "Embedding": ("api.layers", "Embedding"),
    "Linear": ("api.layers", "Linear"),
    "ModulesToSaveWrapper": ("core.adapter_modules", "ModulesToSave"),
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING": ("api.default_targets", "ARCHITECTURES"),
}


def _of_peft(name: str) -> Any:
    """A name of lora_ref, or what it calls otherwise."""
    if name not in _ELSEWHERE:
        return __getattr__(name)
    module, own = _ELSEWHERE[name]
    return getattr(importlib.import_module(f".{module}", __name__), own)


# the modules that PEFT's scripts import names from: each of them has all names
for _name in (
    *("auto", "config", "helpers", "mapping", "mapping_func", "optimizers", "peft_model", "tuners", "tuners.lora"),
    *(f"tuners.lora.{name}" for name in ("config", "corda", "eva", "layer", "loraga", "model")),
    *("tuners.tuners_utils", "utils"),
    *(f"utils.{name}" for name in ("constants", "hotswap", "loftq_utils", "other", "peft_types", "save_and_load")),
):
    _parent, _, _last = f"{__name__}.{_name}".rpartition(".")
    _module: Any = ModuleType(f"{_parent}.{_last}", "Names of lora_ref, under which PEFT has them.")
    _module.__getattr__, _module.__path__ = _of_peft, []
    sys.modules[f"{_parent}.{_last}"] = _module
    setattr(sys.modules[_parent], _last, _module)
