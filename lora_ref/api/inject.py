"""`inject_adapter_in_model`: adapted layers in a model that stays what it is, without a wrapper around it."""

import dataclasses
from typing import Any

from torch import Tensor, nn

from ..core.config import LoraConfig
from ..core.names import exactly
from ..files.adapter_tensors import without_engines
from ..safe.atomic import transaction
from ..safe.unreached import describe
from .model import HELD, LoraModel
from .peft_model import PeftModel


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: dict[str, Tensor] | None = None,
) -> nn.Module:
    """Add an adapter to a plain model in place, and return the model. The newest one is active and trains.

    With a `state_dict` the modules are those that it has factors for, whatever target_modules says.
    `low_cpu_mem_usage` is as in `LoraModel.add_adapter`.
    Raises: ValueError: as `get_peft_model`; a PeftModel (it has add_adapter); no factor in `state_dict`.
    Source: PEFT's function of this name.

    >>> net = inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> type(net).__name__, [name for name, p in net.named_parameters() if p.requires_grad]
    ('Sequential', ['0.lora_A.default.weight', '0.lora_B.default.weight'])
    """
    if isinstance(model, PeftModel | LoraModel):
        raise ValueError(f"the model is a {type(model).__name__}: call its add_adapter")
    if state_dict is not None:
        inside = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in state_dict if ".lora_" in key}
        if not inside:
            raise ValueError("state_dict holds no factors: its keys must be such as 'layers.0.q_proj.lora_A.weight'")
        kinds = describe(model).kinds
        found = [name for name in kinds if without_engines(name) in inside]
        if unknown := sorted(inside - {without_engines(name) for name in found}):
            raise ValueError(f"state_dict has factors of {unknown[0]}, which the model does not have")
        peft_config = dataclasses.replace(peft_config, target_modules=exactly(found, kinds))
    held: LoraModel | None = vars(model).get(HELD)
    if held is None:
        vars(model)[HELD] = LoraModel(model, peft_config, adapter_name, low_cpu_mem_usage)
    else:
        with transaction(held):
            held.add_adapter(adapter_name, peft_config, low_cpu_mem_usage)
            held.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    vars(model)["peft_config"] = vars(model)[HELD].peft_config  # where PEFT's scripts look for it
    return model


INSIDE = ("_orig_mod", "_fsdp_wrapped_module", "module")  # where torch's engines hold the module that they wrap


def lora_model_of(model: Any) -> tuple[LoraModel, str]:
    """The LoraModel of an adapted model, and the prefix of the file that its keys have: none for an injected model.

    A model that torch.compile, FSDP or DistributedDataParallel has wrapped is the model in it.
    Raises: ValueError: the model has no adapters.
    """
    while HELD not in vars(model) and type(model).__module__.startswith("torch."):
        inner = [model._modules[name] for name in INSIDE if name in model._modules]
        if not inner:
            break
        model = inner[0]
    if isinstance(model, PeftModel):
        return model.base_model, ""
    if isinstance(model, LoraModel):
        return model, ""
    held = vars(model).get(HELD)
    if held is None:
        raise ValueError(f"the {type(model).__name__} has no adapters: call get_peft_model or inject_adapter_in_model")
    return held, "base_model.model."
