"""Linear layers whose weight is packed: bitsandbytes' Linear8bitLt and Linear4bit, torchao's tensors, float8.

They compute x W^T + b, and pass a gradient to x. So an adapter can train on them. But W is not there as a matrix: what
reads it or writes it is refused.
"""

from typing import Any

import torch
from torch import Tensor, nn

PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WAY = "dequantise the model first (bitsandbytes: model.dequantize() of transformers; else load it unquantised)"
WAY += ", then load the adapter"


def is_quantized(module: Any) -> bool:
    """Is it a linear layer whose weight is not a plain matrix of floating point with at least 16 bits?

    >>> is_quantized(nn.Linear(2, 2)), is_quantized(nn.Linear(2, 2, dtype=torch.bfloat16))
    (False, False)
    """
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    if weight is None or hasattr(weight, "full_tensor") or isinstance(weight, nn.parameter.UninitializedParameter):
        return False
    return type(weight) not in (Tensor, nn.Parameter) or weight.dtype not in PLAIN


def stand_in(module: Any) -> Tensor:
    """A tensor of the shape (out, in), the dtype and the device of the weight, without memory and without its numbers.

    The dtype is float32 where the weight has integers, or a float of 8 bits.
    """
    weight = module.weight
    dtype = weight.dtype if weight.dtype in PLAIN else torch.float32
    return torch.zeros((), dtype=dtype, device=weight.device).expand(module.out_features, module.in_features)


def why_untrainable(module: Any) -> str | None:
    """The reason why an adapter cannot train on this layer, or None: it is called once, with zeros.

    bitsandbytes is not: its layers repack their weight for inference, or choose a dtype, in the first call.
    """
    if type(module.weight).__module__.partition(".")[0] == "bitsandbytes":
        return None
    x = stand_in(module).new_zeros(1, module.in_features)
    try:
        with torch.no_grad():
            y = module(x)
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AssertionError) as error:
        return f"its weight is a {kind(module.weight)}, on which {type(module).__name__} cannot compute here ({error})"
    return None if y.shape == (1, module.out_features) else f"it returns {tuple(y.shape)} for an input of (1, in)"


def passes_gradient(module: Any) -> bool:
    """Does the layer pass a gradient to its input? Those that round their input do not."""
    if type(module.weight).__module__.partition(".")[0] == "bitsandbytes":
        return True
    with torch.enable_grad():
        x = stand_in(module).new_zeros(1, module.in_features).requires_grad_(True)
        y = module(x)
        return y.requires_grad and torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is not None


def kind(weight: Tensor) -> str:
    """What a weight is: its class, or its dtype.

    >>> kind(torch.ones(1, dtype=torch.int8))
    'tensor of torch.int8'
    """
    return f"tensor of {weight.dtype}" if type(weight) in (Tensor, nn.Parameter) else type(weight).__name__
