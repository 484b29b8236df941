"""lora_ref's functions on NumPy arrays: the formulas, without PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np

import lora_ref
from lora_ref.core.scaling import scaling
from lora_ref.core.update import Factors, delta
from lora_ref.init import METHODS, corda, find, method_of
from lora_ref.numerics import pca

from ..contract import Array, Implementation, Layer, LayerSpec, LayerState

KIND = {"experts": "parameter"}


class NumpyLayer(Layer):
    def __init__(self, spec: LayerSpec) -> None:
        self.spec, self.dtype, self.on, self.kept = spec, np.dtype(spec.dtype), True, None
        self.W = spec.W.astype(self.dtype)
        self.b = None if spec.b is None else spec.b.astype(self.dtype)
        self.s = scaling(spec.r, spec.lora_alpha, spec.use_rslora)
        if check := METHODS[method_of(spec.init_lora_weights)].check:
            check(self.W.shape, spec.r, self.s)
        init = find(spec.init_lora_weights, KIND.get(spec.kind, spec.kind), **self.options())
        if spec.init_lora_weights == "eva":
            from lora_ref.init.eva import eva as init
        rng = np.random.default_rng(spec.seed)
        made: Factors = init(self.W, spec.r, self.s, rng, **self.data())
        self.A, self.B = made.A, made.B
        self.original, self.W = self.W, self.W if made.residual is None else made.residual

    def options(self) -> dict[str, Any]:
        """LoftQ's own options."""
        return dict(self.spec.init_options) if self.spec.init_lora_weights == "loftq" else {}

    def data(self) -> dict[str, Any]:
        """What a pass over the data has found."""
        spec, given = self.spec, self.spec.init_options
        if spec.init_lora_weights == "corda":
            C = sum(corda.call_covariance(X.astype(self.dtype)) for X in given["inputs"]) / len(given["inputs"])
            return {"covariance": C, "corda_method": given["method"]}
        if spec.init_lora_weights == "eva":
            seen = None
            for X in given["inputs"]:
                seen = pca.update(seen, X.astype(self.dtype))
            return {"components": pca.components(seen, spec.r), "whiten": given.get("whiten", False)}
        if spec.init_lora_weights == "lora_ga":
            return {"gradient": given["dy"].T.astype(self.dtype) @ given["x"].astype(self.dtype)}
        return {}

    def read(self) -> LayerState:
        b = None if self.b is None else self.b.astype(np.float64)
        return LayerState(
            *(v.astype(np.float64) for v in (self.W,)), b, *(np.float64(v) for v in (self.A, self.B)), self.s
        )

    def write(self, A: Array, B: Array) -> None:
        self.A, self.B = A.astype(self.A.dtype), B.astype(self.B.dtype)

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        W = self.W if self.on else self.original
        A, B = (self.A, self.B) if self.on and self.kept is None else (0 * self.A, 0 * self.B)
        if self.spec.kind == "embedding":
            y = W.T[x] + self.s * (A.T[x] @ B.T)
        elif self.spec.kind == "experts":
            given = x.astype(self.dtype)
            pairs = zip(given, W, A, B, strict=True)
            y = np.stack([x_e @ W_e.T + self.s * (x_e @ A_e.T) @ B_e.T for x_e, W_e, A_e, B_e in pairs])
        else:
            x = x.astype(self.dtype)
            y = x @ W.T + (0 if self.b is None else self.b) + self.s * (x @ A.T) @ B.T
        return y.astype(np.float64)

    def merge(self, safe: bool = False) -> None:
        if self.kept is not None:
            return
        merged = self.W + delta(self.A, self.B, self.s).astype(self.dtype)
        if not np.isfinite(merged).all():
            raise ValueError("the merged weight would have NaN or infinite numbers")
        self.kept, self.W = self.W, merged

    def unmerge(self) -> None:
        if self.kept is not None:
            self.W, self.kept = self.kept, None

    def merged_copy(self) -> tuple[Array, Array | None]:
        return (self.W + delta(self.A, self.B, self.s).astype(self.dtype)).astype(np.float64), self.b

    def enable(self, enabled: bool) -> None:
        self.on = enabled


class LoraRefNumpy(Implementation):
    """Layers; models are PyTorch's."""

    name = "lora_ref_numpy"
    claims = frozenset(
        [
            "linear",
            "embedding",
            "padding_idx",
            "parameter",
            "experts",
            "rslora",
            "alpha",
            "large_r",
            "unbatched",
            "float64",
            "float32",
            "write",
            "merge",
            "unmerge",
            "merged_copy",
            "exact_unmerge",
            "safe_merge",
            "disable",
            "init:True",
            "init:False",
            "init:gaussian",
            "init:orthogonal",
            "init:pissa",
            "init:pissa_niter",
            "init:olora",
            "init:loftq",
            "init:mica",
            "init:corda",
            "init:eva",
            "init:lora_ga",
            "errors",
        ]
    )

    def version(self) -> str:
        return f"lora_ref {lora_ref.__version__}, numpy {np.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return NumpyLayer(spec)
