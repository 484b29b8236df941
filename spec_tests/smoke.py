"""Is the adapter class right? Asked before anything is asked of the LoRA behind it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .contract import Implementation, LayerSpec, LayerState

KINDS = ("linear", "transposed", "embedding", "conv1d", "conv2d", "conv3d", "parameter", "experts")


def spec(kind: str) -> LayerSpec:
    """A layer of this kind with 2 outputs, 3 inputs and small integers as weights."""
    kernel = {"conv1d": (2,), "conv2d": (2, 1), "conv3d": (1, 2, 1)}.get(kind, ())
    batch = (2,) if kind == "experts" else ()
    W = np.arange(1.0, 1 + int(np.prod((*batch, 2, 3, *kernel)))).reshape(*batch, 2, 3, *kernel)
    b = np.array([1.0, -2.0]) if kind in ("linear", "transposed") or kernel else None
    return LayerSpec(kind, W, b, r=1, lora_alpha=1.0)


def check(implementation: Implementation) -> None:
    """Raise TypeError, with what is wrong, if the adapter class does not keep the contract."""
    kinds = [kind for kind in KINDS if kind in implementation.claims]
    if not kinds:
        raise TypeError(f"{implementation.name} claims no kind of layer: claims must have one of {', '.join(KINDS)}")
    for kind in kinds:
        case = spec(kind)
        try:
            state = implementation.layer(case).read()
        except Exception as error:
            raise _wrong(implementation, kind, f"layer(spec).read() raised {type(error).__name__}: {error}") from error
        if not isinstance(state, LayerState):
            raise _wrong(implementation, kind, f"read() must give a LayerState, it gave a {type(state).__name__}")
        want: dict[str, Any] = {"W": case.W, "b": case.b}
        for name, value in want.items():
            got = getattr(state, name)
            if value is None:
                if got is not None:
                    raise _wrong(implementation, kind, f"read().{name} is {got!r}: the layer has none, so None is due")
            elif not isinstance(got, np.ndarray) or got.shape != value.shape or not np.array_equal(got, value):
                raise _wrong(implementation, kind, f"read().{name} is {got!r}: the layer was made with {value!r}")
        batch, kernel = case.W.shape[: len(case.W.shape) - 2] if kind == "experts" else (), case.W.shape[2:]
        shapes = {"A": (*batch, 1, 3, *(() if batch else kernel)), "B": (*batch, 2, 1)}
        for name, shape in shapes.items():
            got = getattr(state, name)
            if not isinstance(got, np.ndarray) or got.dtype != np.float64:
                is_now = f"an array of {got.dtype}" if isinstance(got, np.ndarray) else f"a {type(got).__name__}"
                raise _wrong(implementation, kind, f"read().{name} must be a float64 NumPy array, it is {is_now}")
            if got.shape != shape:
                raise _wrong(implementation, kind, f"read().{name} has the shape {got.shape}, it must be {shape}")
        if not isinstance(state.scaling, float):
            raise _wrong(implementation, kind, f"read().scaling must be a float, it is {state.scaling!r}")


def _wrong(implementation: Implementation, kind: str, what: str) -> TypeError:
    return TypeError(f"the adapter class of {implementation.name} is wrong (before any LoRA is tested): {kind}: {what}")
