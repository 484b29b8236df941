"""PEFT's helpers for quantised base models."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..core.adapter_modules import unwrapped
from ..numerics.leading import leading_svd
from ..safe.plain import check_plain
from ..safe.progress import steps
from ..safe.quantized import is_quantized
from .peft_model import PeftModel


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a base model, cast its plain half-precision parameters to float32, and checkpoint its activations.

    Call it before `get_peft_model`. A model without quantised layers is not checkpointed. Returns the model.
    `auto_clear_cache` empties the cache of the GPU's memory.
    Source: PEFT's function of this name.
    """
    model.requires_grad_(False)
    packed = [module for module in model.modules() if is_quantized(module)]
    skipped = {id(module.weight) for module in packed}
    for parameter in model.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in skipped:
            parameter.data = parameter.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if packed and use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return model


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: PeftModel,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[PeftModel, str], bool] | None = None,
) -> None:
    """B, A <- the best factors of (W - Q) / s, so that Q + s B A is near W. Q is the quantised weight in use.

    W is read from the safetensors files of the base model, layer by layer. `callback(model, name)` is called after each
    layer; where it returns False, the layer's factors are as before.

    Args:
        model_path: a file, or a folder with one or several of them. None: the folder that the base model came from.
    Raises: ValueError: no layer of this adapter is quantised with 4 bits, or the files lack a weight;
        then nothing has changed.
    Source: LoftQ, arXiv 2310.08659, equation 6, and PEFT's function of this name.
    Differs from PEFT: the factors are divided by sqrt(s) each, so that the scaling is undone. PEFT assumes s = 1.
    """
    peft_model.base_model._check_known(adapter_name)
    layers = {
        name: layer
        for name, layer in peft_model.base_model.lora_layers().items()
        if adapter_name in layer.r and hasattr(getattr(unwrapped(layer), "weight", None), "quant_state")
    }
    if not layers:
        raise ValueError(f"no layer of adapter {adapter_name!r} is a Linear4bit of bitsandbytes: load it in 4 bits")
    check_plain(layers, [adapter_name], base=False)
    place = model_path or getattr(peft_model.get_base_model(), "name_or_path", None)
    if not place:
        raise ValueError("model_path=None: the base model does not say where it came from; give its folder or file")
    if zero := [name for name, layer in layers.items() if layer.scaling[adapter_name] == 0]:
        raise ValueError(f"{zero[0]}: its scaling is 0, by which W - Q cannot be divided: call set_scale first")
    tensors = tensor_files(Path(str(place)))
    if missing := [name for name in layers if f"{name}.weight" not in tensors]:
        raise ValueError(f"model_path={model_path!r}: no safetensors file there holds {missing[0]}.weight")
    with steps(list(layers), "replace_lora_weights_loftq") as names:
        for name in names:
            replace_by_loftq(peft_model, name, layers[name], adapter_name, tensors[f"{name}.weight"], callback)


def replace_by_loftq(
    model: PeftModel,
    name: str,
    layer: Any,
    adapter_name: str,
    path: Path,
    callback: Callable[[PeftModel, str], bool] | None,
) -> None:
    """One layer of `replace_lora_weights_loftq`."""
    with safe_open(path, framework="pt") as file:
        W = file.get_tensor(f"{name}.weight").to(layer.base_weight.device, torch.float32)
    A, B = (module.weight for module in (layer.lora_A[adapter_name], layer.lora_B[adapter_name]))
    before = A.data, B.data
    U, S, Vh = leading_svd((W - dequantized(unwrapped(layer))) / layer.scaling[adapter_name], layer.r[adapter_name])
    root = S.sqrt()
    A.data, B.data = (root[:, None] * Vh).to(A).contiguous(), (U * root).to(B).contiguous()
    if callback is not None and not callback(model, name):
        A.data, B.data = before


def dequantized(module: nn.Module) -> Tensor:
    """The weight of a Linear4bit as a matrix (out, in) in float32."""
    import bitsandbytes

    weight: Any = module.weight
    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # repacked, in a first call without gradients
        data, state = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    return bitsandbytes.functional.dequantize_4bit(data, state).float()


def tensor_files(path: Path) -> dict[str, Path]:
    """{name of a tensor: the safetensors file that holds it}, of one file or of all in a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    found: dict[str, Path] = {}
    for each in files:
        with safe_open(each, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), each)
    return found
