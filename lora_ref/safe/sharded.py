"""Weights that torch.distributed has sharded: gathered for a file, and never replaced.

FSDP2 (`fully_shard`) and tensor parallelism make a parameter a DTensor, of which each rank holds a part. An adapted
model trains as it is then. But the engine holds references to the parameters that it has sharded. It would never see
a parameter that is installed afterwards. So adapters are added, loaded and merged before the model is sharded.
"""

import torch
from torch import Tensor, nn

from .atomic import tree


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor. Every rank must call this at the same time: they exchange their parts.

    >>> gathered(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor | None) -> bool:
    """Is it a DTensor? Asked without importing torch.distributed, which takes as long as all of lora_ref."""
    return type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "full_tensor")


def check_not_sharded(model: nn.Module, what: str) -> None:
    """Raise ValueError if any parameter of the model is sharded."""
    if any(is_sharded(p) for module in tree(model) for p in module._parameters.values()):
        raise ValueError(
            f"{what} is not possible once the model is sharded (fully_shard, parallelize_module): the engine would go "
            "on with the parameters that it has cut. Do it before, or save the adapter and do it in one process"
        )


def is_main_process() -> bool:
    """Is this rank 0, or a process by itself?"""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
