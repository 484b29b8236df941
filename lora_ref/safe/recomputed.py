"""A checkpointed layer that is computed again in backward must have the adapters of the forward pass.

Checkpointing without reentrant autograd computes with hooks on saved tensors, and compares what it saves: so does
`Checkpointed`. The reentrant kind runs the forward pass without gradients. The state is kept at its context then.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

State = tuple[Any, ...]  # what a layer's output depends on: (disabled, the active adapters, adapter_names, ...)
FIRST, AGAIN = (getattr(checkpoint.CheckpointFunction, name).__code__ for name in ("forward", "backward"))
TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in torch 2.7


def checked(layer: Any, y: Any, *numbers: Any) -> Any:
    """y, the output of a layer. ValueError, now or in backward: it is computed again, with other adapters.

    `numbers` are what its output depends on beside the names of the adapters.
    """
    if torch.compiler.is_compiling():
        return y
    grad, again = torch.is_grad_enabled(), torch._C._current_graph_task_id() != -1  # in a backward pass
    hooks = grad and will_be_recomputed()
    if not (hooks or again) and grad:
        return y
    names = layer.adapter_names if callable(layer.adapter_names) else tuple(layer.adapter_names or ())
    state = (layer.disable_adapters, tuple(layer.active_adapters), names, *numbers)
    if again or not grad:
        compare_with_contexts(layer, state)
    return with_check(y, state) if hooks else y


def will_be_recomputed() -> bool:
    """Are the hooks on saved tensors those of torch.utils.checkpoint (use_reentrant=False)?"""
    if TOP_HOOKS is None:
        return any(frame.f_globals.get("__name__") == checkpoint.__name__ for frame in callers())
    hooks = TOP_HOOKS(False)
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__


def callers() -> Iterator[Any]:
    """The frames of the functions that are running, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def compare_with_contexts(layer: Any, state: State) -> None:
    """In forward of reentrant checkpoints, keep the state at their contexts; in their backward, compare."""
    for frame in callers():
        if frame.f_code is FIRST or frame.f_code is AGAIN:
            states = vars(frame.f_locals["ctx"]).setdefault("lora_ref_states", {}).setdefault(id(layer), set())
            if frame.f_code is FIRST:
                states.add(state)
            elif state not in states:
                raise ValueError(message(next(iter(states), state)))


def message(state: State) -> str:
    """The error, which says what the state was in forward."""
    off, active, names, *_ = state
    adapters = f"adapter_names was {names}" if names else f"the active adapters were {list(active)}"
    was = f"in forward {adapters}{' (disabled)' if off else ''}"
    return f"a checkpointed layer was recomputed with other adapters: {was}; switch after backward()"


def with_check(y: Any, state: State) -> Any:
    """The output of a layer, whose first tensor with a gradient is checked in backward."""
    if type(y) is tuple:
        return tuple(with_check(part, state) if i == 0 else part for i, part in enumerate(y))
    return Checkpointed.apply(y, state) if isinstance(y, Tensor) and y.requires_grad else y


class Checkpointed(torch.autograd.Function):
    """The identity, with an error in backward if the layer was recomputed in another state than in forward.

    `ctx` is that of the first forward. What it saved is replaced by what the recomputation saved: here, a number.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, state: State) -> Tensor:
        ctx.state = state
        ctx.save_for_backward(torch.tensor(hash(state)))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if int(ctx.saved_tensors[0]) != hash(ctx.state):
            raise ValueError(message(ctx.state))
        return grad, None
