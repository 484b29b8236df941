"""Bias modes: which biases of the BASE model train along with an adapter.

    "none"       none of them
    "all"        every parameter named `bias`, in adapted modules, norms and everywhere else
    "lora_only"  the bias of each adapted module (LoRA itself has no bias)

They are trained in place. So switching the adapter off, or unloading it, does NOT give the
original outputs back once such a bias has been trained.
"""

from torch import nn

from .adapter_modules import ModulesToSave
from .layer import LoraLayer


def biases(model: nn.Module, mode: str, adapter_name: str) -> dict[str, nn.Parameter]:
    """{name: parameter} of the base biases that train with this adapter, names as in `named_parameters()`.

    Source: microsoft/LoRA, `mark_only_lora_as_trainable`; PEFT's LoraConfig, `bias`.
    """
    if mode == "none":
        return {}
    # a module that this adapter saves whole brings its own bias along; other adapters' copies are theirs
    saved = [m for m in model.modules() if isinstance(m, ModulesToSave)]
    mine = [w if adapter_name in w.adapters() else w.modules_to_save for w in saved]
    whole = {id(m) for part in mine for m in part.modules()}
    adapted = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter_name in m.adapters()]
    bases = {id(layer.get_base_layer()) for layer in adapted}
    return {
        f"{name}.bias" if name else "bias": bias
        for name, module in model.named_modules()
        if (bias := module._parameters.get("bias")) is not None
        and id(module) not in whole
        and (mode == "all" or id(module) in bases)
    }
