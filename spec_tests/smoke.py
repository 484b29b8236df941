"""Is the adapter class right? Asked before anything is asked of the LoRA behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .contract import MESH, Array, Implementation, LayerSpec, LayerState, ModelSpec, ModuleSpec, has_layers

KINDS = ("linear", "transposed", "embedding", "conv1d", "conv2d", "conv3d", "parameter", "experts")
CHAINED = ("linear", "transposed")


def spec(kind: str) -> LayerSpec:
    """A layer of this kind with 2 outputs, 3 inputs and small integers as weights."""
    kernel = {"conv1d": (2,), "conv2d": (2, 1), "conv3d": (1, 2, 1)}.get(kind, ())
    batch = (2,) if kind == "experts" else ()
    W = np.arange(1.0, 1 + int(np.prod((*batch, 2, 3, *kernel)))).reshape(*batch, 2, 3, *kernel)
    b = np.array([1.0, -2.0]) if kind in CHAINED or kernel else None
    return LayerSpec(kind, W, b, r=1, lora_alpha=1.0)


def chain(kind: str) -> ModelSpec:
    """Two layers of this kind, 3 numbers to 2 to 4, that are both adapted."""
    modules = {
        "up": ModuleSpec(kind, np.arange(1.0, 7.0).reshape(2, 3), np.array([1.0, -2.0])),
        "down": ModuleSpec(kind, np.arange(1.0, 9.0).reshape(4, 2), np.array([1.0, 2.0, 3.0, 4.0])),
    }
    return ModelSpec(modules, {"r": 1, "lora_alpha": 1, "target_modules": ["up", "down"]})


def given(case: LayerSpec) -> tuple[Array, tuple[int, ...]]:
    """An input of a layer of `spec`, and the shape of its output."""
    if case.kind == "embedding":
        return np.array([0, 2, 1, 0]), (4, 2)
    if case.kind == "experts":
        return np.ones((2, 4, 3)), (2, 4, 2)
    kernel = case.W.shape[2:] if MESH.get(case.kind) else ()
    if kernel:
        return np.ones((4, 3, *[5] * len(kernel))), (4, 2, *(6 - k for k in kernel))
    return np.ones((4, 3)), (4, 2)


def check(implementation: Implementation) -> None:
    """Raise TypeError, with what is wrong, if the adapter class does not keep the contract."""
    kinds = [kind for kind in KINDS if kind in implementation.claims]
    if not kinds:
        raise TypeError(f"{implementation.name} claims no kind of layer: claims must have one of {', '.join(KINDS)}")
    if has_layers(implementation):
        for kind in kinds:
            _layer(implementation, kind)
    elif not implementation.claims & {"model", "reads_peft"}:
        what = "it has no method layer: write layer(spec), or claim 'model' and write model(spec)"
        raise _wrong(implementation, kinds[0], what)
    chained = [kind for kind in CHAINED if kind in kinds]
    if "model" in implementation.claims and chained:
        _model(implementation, chained[0])


def _layer(implementation: Implementation, kind: str) -> None:
    case = spec(kind)
    layer = _got(implementation, kind, "layer(spec)", lambda: implementation.layer(case))
    state = _got(implementation, kind, "layer(spec).read()", lambda: layer.read())
    batch, kernel = case.W.shape[: len(case.W.shape) - 2] if kind == "experts" else (), case.W.shape[2:]
    shapes = {"A": (*batch, 1, 3, *(() if batch else kernel)), "B": (*batch, 2, 1)}
    _state(implementation, kind, "read()", state, {"W": case.W, "b": case.b}, shapes)
    x, shape = given(case)
    _forward(implementation, kind, layer, x, shape)


def _model(implementation: Implementation, kind: str) -> None:
    case, kind = chain(kind), "model"
    model = _got(implementation, kind, "model(spec)", lambda: implementation.model(case))
    adapted = _got(implementation, kind, "model(spec).adapted()", lambda: model.adapted())
    if not isinstance(adapted, dict) or set(adapted) != set(case.modules):
        what = f"adapted() must give {{module: (r, s)}} of {', '.join(case.modules)}, it gave {adapted!r}"
        raise _wrong(implementation, kind, what)
    for name, pair in adapted.items():
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], float) and pair[0] == 1):
            what = f"adapted()[{name!r}] must be (r, s), here (1, a float), it is {pair!r}"
            raise _wrong(implementation, kind, what)
    for name, module in case.modules.items():
        state = _got(implementation, kind, f"model(spec).read({name!r})", lambda name=name: model.read(name))  # type: ignore[misc]
        out, n_in = module.W.shape
        want, shapes = {"W": module.W, "b": module.b}, {"A": (1, n_in), "B": (out, 1)}
        _state(implementation, kind, f"read({name!r})", state, want, shapes)
    _forward(implementation, kind, model, np.ones((5, 3)), (5, 4))


def _forward(implementation: Implementation, kind: str, adapted: Any, x: Array, shape: tuple[int, ...]) -> None:
    try:
        y = adapted.forward(x)
    except (NotImplementedError, AttributeError, TypeError) as error:
        what = f"forward(x) with x of shape {x.shape} raised {type(error).__name__}: {error}"
        raise _wrong(implementation, kind, what) from error
    except Exception:  # the LoRA itself may be what fails: the requirements say so
        return
    _array(implementation, kind, "what forward(x) returns", y, shape, f", for x of shape {x.shape}")


def _got(implementation: Implementation, kind: str, call: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        raise _wrong(implementation, kind, f"{call} raised {type(error).__name__}: {error}") from error


def _state(
    implementation: Implementation,
    kind: str,
    call: str,
    state: Any,
    want: dict[str, Array | None],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    if not isinstance(state, LayerState):
        raise _wrong(implementation, kind, f"{call} must give a LayerState, it gave a {type(state).__name__}")
    for name, value in want.items():
        got = getattr(state, name)
        if value is None:
            if got is not None:
                raise _wrong(implementation, kind, f"{call}.{name} is {got!r}: the layer has none, so None is due")
        elif not isinstance(got, np.ndarray) or got.shape != value.shape or not np.array_equal(got, value):
            raise _wrong(implementation, kind, f"{call}.{name} is {got!r}: the layer was made with {value!r}")
    for name, shape in shapes.items():
        _array(implementation, kind, f"{call}.{name}", getattr(state, name), shape)
    if not isinstance(state.scaling, float):
        raise _wrong(implementation, kind, f"{call}.scaling must be a float, it is {state.scaling!r}")


def _array(
    implementation: Implementation, kind: str, what: str, got: Any, shape: tuple[int, ...], given: str = ""
) -> None:
    if not isinstance(got, np.ndarray) or got.dtype != np.float64:
        is_now = f"an array of {got.dtype}" if isinstance(got, np.ndarray) else f"a {type(got).__name__}"
        said = f"{what} must be a float64 NumPy array, it is {is_now}: convert it in the adapter class"
        raise _wrong(implementation, kind, said)
    if got.shape != shape:
        raise _wrong(implementation, kind, f"{what} has the shape {got.shape}, it must be {shape}{given}")


def _wrong(implementation: Implementation, kind: str, what: str) -> TypeError:
    return TypeError(f"the adapter class of {implementation.name} is wrong (before any LoRA is tested): {kind}: {what}")
