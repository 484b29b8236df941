"""LoRA's formulas in float64, as plainly as they can be written, and the bounds that rounding is measured by."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from .contract import MESH, Array, LayerSpec, LayerState


def delta(A: Array, B: Array, s: float) -> Array:
    """D = s B A, in the shape of W. A (r, in) or (r, in, *kernel) or (E, r, in); B (out, r) or (E, out, r)."""
    if A.ndim == 3 and B.ndim == 3:
        return s * (B @ A)
    return s * np.tensordot(B, A, 1)  # (out, r) . (r, ...) -> (out, ...)


def delta_bound(A: Array, B: Array, s: float) -> Array:
    """The same on absolute values."""
    return delta(abs(A), abs(B), abs(s))


def apply(spec: LayerSpec, W: Array, b: Array | None, x: Array) -> Array:
    """The base layer's formula with a weight W, of any kind of layer."""
    if spec.kind == "embedding":
        return W.T[x] * spec.base.get("embed_scale", 1.0)
    if spec.kind == "experts":
        return np.einsum("e...i,eoi->e...o", x, W)  # x (experts, tokens, in)
    if MESH.get(spec.kind, 0):
        return _convolved(spec, W, b, x)
    y = x @ W.T
    return y if b is None else y + b


def apply_bound(spec: LayerSpec, W: Array, b: Array | None, x: Array) -> Array:
    """The same on absolute values."""
    return apply(spec, abs(W), None if b is None else abs(b), x if spec.kind == "embedding" else abs(x))


def branch(spec: LayerSpec, state: LayerState, x: Array) -> Array:
    """s B A x. A sees the inputs of all groups of a convolution."""
    spec = spec.but(base={**spec.base, "groups": 1}) if "groups" in spec.base else spec
    return apply(spec, delta(state.A, state.B, state.scaling), None, x)


def branch_bound(spec: LayerSpec, state: LayerState, x: Array) -> Array:
    """The same on absolute values."""
    spec = spec.but(base={**spec.base, "groups": 1}) if "groups" in spec.base else spec
    return apply_bound(spec, delta_bound(state.A, state.B, state.scaling), None, x)


def forward(spec: LayerSpec, state: LayerState, x: Array) -> tuple[Array, Array]:
    """y = W x + b + s B A x, and its bound."""
    y = apply(spec, state.W, state.b, x) + branch(spec, state, x)
    return y, apply_bound(spec, state.W, state.b, x) + branch_bound(spec, state, x)


#: numpy.pad's name of each padding mode
PADDING = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}


def _convolved(spec: LayerSpec, W: Array, b: Array | None, x: Array) -> Array:
    """x (batch, in, *size), W (out, in / groups, *kernel) -> (batch, out, *size')."""
    kernel, dims, groups = W.shape[2:], W.ndim - 2, spec.base.get("groups", 1)
    if groups > 1:
        alone = spec.but(base={**spec.base, "groups": 1})
        parts = zip(np.split(W, groups), np.split(x, groups, 1), strict=True)
        y = np.concatenate([_convolved(alone, part, None, seen) for part, seen in parts], 1)
        return y if b is None else y + b.reshape(-1, *[1] * dims)
    mode: Any = PADDING[spec.base.get("padding_mode", "zeros")]
    stride, padding, dilation = (spec.along(name) for name in ("stride", "padding", "dilation"))
    x = np.pad(x, [(0, 0), (0, 0)] + [(p, p) for p in padding], mode)
    span = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [(n - k) // step + 1 for n, k, step in zip(x.shape[2:], span, stride, strict=True)]
    y = np.zeros((len(x), len(W), *size))
    for at in itertools.product(*(range(k) for k in kernel)):
        window = tuple(
            slice(a * d, a * d + step * (n - 1) + 1, step)
            for a, n, d, step in zip(at, size, dilation, stride, strict=True)
        )
        y += np.einsum("bi...,oi->bo...", x[(..., *window)], W[(..., *at)])
    return y if b is None else y + b.reshape(-1, *[1] * dims)
