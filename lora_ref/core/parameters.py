"""Adapters on raw parameters (`target_parameters`): weights that no layer of their own owns.

    W_e <- W_e + s * B_e @ A_e       for a matrix, or for each expert e of a stack (E, out, in)

The module runs as it is, with the adapted parameter put in for the time of the call.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from . import update as decomposition
from .layer import LoraLayer


class Parameter(LoraLayer):
    """A module one of whose parameters (out, in) or (E, out, in) is adapted.

    A stack whose module says `is_transposed` is stored as (E, in, out). In the adapter file the
    experts are packed into A (r*E, in) and B (out, r*E), see `decomposition.pack_experts`.
    Several parameters of one module nest: a wrapper in a wrapper.

    Differs from PEFT: the parametrised module is not changed during the call
    (`torch.func.functional_call`), and merged_adapters may be mixed with active ones.
    """

    kind = "parameter"

    def __init__(self, base_layer: nn.Module, parameter_name: str) -> None:
        super().__init__(base_layer)
        self.weight_name = parameter_name
        self.fan_in_fan_out = self.base_weight.ndim == 3 and getattr(self.get_base_layer(), "is_transposed", False)

    def logical(self, W: Tensor) -> Float[Tensor, "*experts out in"]:
        return W.mT if self.fan_in_fan_out else W

    def stored(self, D: Float[Tensor, "*experts out in"]) -> Tensor:
        return D.mT if self.fan_in_fan_out else D

    def build(self, name: str, A: Tensor, B: Tensor) -> None:
        super().build(name, *(decomposition.pack_experts(A, B) if A.ndim == 3 else (A, B)))

    def factors(self, name: str) -> tuple[Float[Tensor, "*experts r in"], Float[Tensor, "*experts out r"]]:
        A, B = super().factors(name)
        W = self.base_weight
        return (A, B) if W.ndim == 2 else decomposition.unpack_experts(A, B, W.shape[0])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.sample_adapters is not None and not self.disable_adapters:
            if set(self.sample_adapters) & set(self.adapters()):
                raise ValueError(
                    "adapter_names is not possible with target_parameters: one weight serves the whole batch"
                )
            return self.base_layer(*args, **kwargs)
        running = [name for name in self.active_adapters if name not in self.merged_adapters]
        if self.disable_adapters or not running:
            return self.base_layer(*args, **kwargs)
        W = self.base_weight
        total = W.to(torch.promote_types(W.dtype, torch.float32))
        for name in running:
            A, B = self.factors(name)
            total = total + self.stored(decomposition.delta(A, B, self.scaling[name]))
        path = self.weight_name
        inner = self.base_layer
        while isinstance(inner, LoraLayer):
            path, inner = f"base_layer.{path}", inner.base_layer
        return torch.func.functional_call(self.base_layer, {path: total.to(W.dtype)}, args, kwargs)
