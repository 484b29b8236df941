"""Adapter classes that are known to be bad, and what the suite has to say of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..contract import CLAIMS, Array, Implementation, Layer, LayerSpec, LayerState, Model, ModelSpec
from ..engine import OUTCOMES, examine
from ..reference.plain import Plain, PlainLayer
from ..registry import load

# -- refused before any requirement is tried ---------------------------------------------------


class WrongOrientation(Plain):
    """Gives W as it is stored."""

    name = "wrong orientation"

    def layer(self, spec: LayerSpec) -> Layer:
        return _Read(spec, lambda state: state._replace(W=state.W.T))


class WrongPrecision(Plain):
    """Gives factors in float32."""

    name = "wrong precision"

    def layer(self, spec: LayerSpec) -> Layer:
        return _Read(spec, lambda state: state._replace(A=state.A.astype(np.float32)))


class InventedBias(Plain):
    """Gives a bias to layers that have none."""

    name = "invented bias"

    def layer(self, spec: LayerSpec) -> Layer:
        return _Read(spec, lambda state: state._replace(b=np.zeros(len(spec.W)) if state.b is None else state.b))


class _Read(PlainLayer):
    def __init__(self, spec: LayerSpec, changed: Any) -> None:
        super().__init__(spec)
        self.changed = changed

    def read(self) -> LayerState:
        return self.changed(super().read())


class Absent(Implementation):
    """Claims a layer, and has none."""

    name = "absent"
    claims = frozenset({"linear"})


class Modest(Implementation):
    """Claims no layer at all."""

    name = "modest"
    claims = frozenset({"write"})


class UnknownClaim(Plain):
    """Claims what does not exist."""

    name = "unknown claim"
    claims = frozenset({"linear", "teleport"})


class UnknownConvention(Plain):
    """Has a convention that does not exist."""

    name = "unknown convention"
    conventions: Mapping[str, Any] = {"upside_down": True}


REFUSED: dict[type[Implementation], str] = {
    WrongOrientation: r"read\(\)\.W",
    WrongPrecision: r"read\(\)\.A must be a float64",
    InventedBias: "so None is due",
    Absent: "it has no method layer",
    Modest: "claims no kind of layer",
    UnknownClaim: "claims teleport",
    UnknownConvention: "conventions upside_down",
}

# -- tried, and counted ------------------------------------------------------------------------


class _OnlyRead(Layer):
    def __init__(self, spec: LayerSpec) -> None:
        self.inner = PlainLayer(spec)

    def read(self) -> LayerState:
        return self.inner.read()


class OverClaiming(Implementation):
    """Claims everything, and can read only: the rest raises NotImplementedError."""

    name = "over-claiming"
    claims = frozenset(CLAIMS)

    def layer(self, spec: LayerSpec) -> Layer:
        return _OnlyRead(spec)


class Crashing(Plain):
    """Every operation but reading a fresh layer fails with an error of its own."""

    name = "crashing"

    def layer(self, spec: LayerSpec) -> Layer:
        return _Crashes(spec)

    def model(self, spec: ModelSpec) -> Model:
        raise RuntimeError("out of order")

    def load(self, spec: ModelSpec, folder: Any) -> Model:
        raise RuntimeError("out of order")


class _Crashes(_OnlyRead):
    def __getattribute__(self, name: str) -> Any:
        if name in ("inner", "read", "__class__", "__dict__"):
            return super().__getattribute__(name)
        raise RuntimeError("out of order")


class _Forward(PlainLayer):
    def __init__(self, spec: LayerSpec, changed: Any) -> None:
        super().__init__(spec)
        self.changed = changed

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        return self.changed(super().forward(x, train, seed))


LAYER_CLAIMS = frozenset(
    c for c in CLAIMS if c in ("linear", "write", "merge", "dropout", "disable", "float32", "rslora")
)


class Constant(Plain):
    """Its layers give zeros."""

    name = "constant"
    claims = LAYER_CLAIMS

    def layer(self, spec: LayerSpec) -> Layer:
        return _Forward(spec, np.zeros_like)


class NotANumber(Plain):
    """Its layers give NaN."""

    name = "not a number"
    claims = LAYER_CLAIMS

    def layer(self, spec: LayerSpec) -> Layer:
        return _Forward(spec, lambda y: y * np.nan)


class Unrepeatable(Plain):
    """Its layers give something else each time."""

    name = "unrepeatable"
    claims = LAYER_CLAIMS

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def layer(self, spec: LayerSpec) -> Layer:
        return _Forward(spec, lambda y: y + self.rng.integers(0, 1000, y.shape))


COUNTED: tuple[type[Implementation], ...] = (OverClaiming, Crashing, Constant, NotANumber, Unrepeatable)


def counts(kind: type[Implementation]) -> dict[str, int]:
    """{outcome: how many requirements have it}, with few examples."""
    found: Counter[str] = Counter()
    for requirement in load().values():
        made = kind()  # a fresh one, so that what is random does not depend on the order
        found[examine(made.name, made, requirement, "quick").outcome] += 1
    return {outcome: found[outcome] for outcome in OUTCOMES if found[outcome]}
