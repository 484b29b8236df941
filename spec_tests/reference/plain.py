"""LoRA in NumPy, in one file. It passes every requirement of the suite.

    y = W x + b + s B A x        s = lora_alpha / r; with use_rslora, s = lora_alpha / sqrt(r)

W (out, in) and b (out,) belong to a layer and stay frozen. A (r, in) and B (out, r) are the factors of one adapter.

How to read it. Begin with `Site.forward` and `Site.branch`: they are the formula. Then read from the top:

    start         the first A and B, for each value of init_lora_weights
    Site          one layer of any kind: adapters by name, forward, merge, unmerge, gradients
    PlainLayer    a Site with one adapter, as `contract.Layer` wants it
    checked       the options of a configuration, and which values are refused
    targets       which modules get an adapter, and with which r and lora_alpha
    PlainModel    several Sites: switch, merge, combine, save and load, as `contract.Model` wants it
    Plain         the class that `lora-ref check plain` tries

Three conventions hold everywhere:

- Arrays are float64. `rounded` gives the value that the dtype of the layer would store.
- `Site.W` is stored as a framework stores it: the weight of an embedding and of a transposed layer is (in, out).
  `Site.side` converts between this and (out, in). A and B are never transposed.
- No init changes `Site.W`. Where an init subtracts from the weight, as PiSSA does, `Adapter.moved` is what it
  subtracts. `Site.shifted` subtracts it while the adapter is active.

The file needs NumPy, the normal quantiles of SciPy, and the classes of `contract`. It shares no code with a library
that the suite tests. `spec_tests.bugs.seeded` replaces single lines of it by faults.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy.stats import norm

from ..contract import CLAIMS, MESH, Array, Implementation, Layer, LayerSpec, LayerState, Model, ModelSpec

LINEAR = ("linear", "transposed", "attention")
FLAT = (*LINEAR, "parameter")
ON_ITS_SIDE = ("transposed", "embedding")
INITS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "mica", "corda", "eva", "lora_ga")
PADDED: Any = {"zeros": "constant", "reflect": "reflect", "circular": "wrap", "replicate": "edge"}  # numpy.pad's modes
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def rounded(x: Any, dtype: str) -> Array:
    """x, rounded to the nearest number of the dtype, ties to even.

    NumPy has no bfloat16. A bfloat16 is the upper 16 bits of a float32.
    """
    if dtype != "bfloat16":
        return np.asarray(x).astype(dtype).astype(np.float64)
    bits = np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.uint64)
    bits = np.asarray((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16)
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def turned(W: Array) -> Array:
    """W^T, for each expert where there are several."""
    return np.swapaxes(W, -1, -2)


# -- the first A and B -------------------------------------------------------------------------


def start(init: bool | str, W: Array, kind: str, r: int, s: float, options: Any, rng: Any) -> tuple[Array, Array]:
    """A (r, in) and B (out, r) for the weight W (out, in), of an adapter with scaling s.

    True          A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0
    False         A ~ U(-1/sqrt(in), 1/sqrt(in)), B ~ U(-1/sqrt(r), 1/sqrt(r))
    "gaussian"    A ~ N(0, 1/r^2), B = 0
    "orthogonal"  B A = 0: A = Q_even^T X^T / 10, B = Y Q_odd / 10, with rows of one orthogonal Q, and Gaussian X and Y
    "mica"        A = 0, B = the left singular vectors of the r smallest singular values of W
    "olora"       B = the first r columns of Q, A = the first r rows of R, where W = Q R
    "pissa"       s B A = the sum of the r leading singular triples of W
    "loftq"       likewise of W - Q, where Q is W quantised; each further iteration quantises W - s B A
    "corda"       s B A = r singular triples of W C, times C^-1, where C is the covariance of the inputs
    "eva"         A = the r leading principal components of the inputs, B = 0
    "lora_ga"     B = left, A = the next r right singular vectors of the gradient dy^T x, times out^(1/4) / 16

    In an embedding True and "gaussian" are A = 0, B ~ N(0, 1), and False draws both from N(0, 1). In a convolution
    `in` is the number of channels times the size of the kernel.

    Args:
        s: the scaling. B A is divided by it, so that s B A is what the list says.
        options: the data of "corda", "eva" and "lora_ga"; the bits and iterations of "loftq", which enters its Q here.

    Raises:
        ValueError: the init does not exist for this kind of layer, this r or this s.
    """
    kernel = W.shape[2:] if MESH.get(kind) else ()
    experts = W.shape[:1] if kind == "experts" else ()
    out, n_in = W.shape[len(experts) : len(experts) + 2]
    shape_A, shape_B = (*experts, r, n_in, *kernel), (*experts, out, r)
    init = init.lower() if isinstance(init, str) else init
    bound = math.prod([n_in, *kernel]) ** -0.5
    if kind == "embedding" and init in (True, "gaussian"):
        return np.zeros(shape_A), rng.standard_normal(shape_B)
    if kind == "embedding" and init is False:
        return rng.standard_normal(shape_A), rng.standard_normal(shape_B)
    if init is True:
        return rng.uniform(-bound, bound, shape_A), np.zeros(shape_B)
    if init is False:
        return rng.uniform(-bound, bound, shape_A), rng.uniform(-(r**-0.5), r**-0.5, shape_B)
    if init == "gaussian":
        return rng.standard_normal(shape_A) / r, np.zeros(shape_B)
    if kind not in (FLAT if init != "mica" else (*FLAT, "embedding")):
        raise ValueError(f"{init} cannot start {kind}")
    if init == "orthogonal":
        if r % 2:
            raise ValueError(f"orthogonal needs an even r, not {r}")
        Q = np.linalg.qr(rng.standard_normal((r, r)))[0]
        A = (rng.standard_normal((n_in, r // 2)) @ Q[0::2]).T / 10
        return A, rng.standard_normal((out, r // 2)) @ Q[1::2] / 10
    if r > min(out, n_in):
        raise ValueError(f"{init} needs r <= min(in, out): {r} > {min(out, n_in)}")
    if s <= 0 and init not in ("mica", "eva"):
        raise ValueError(f"{init} needs lora_alpha > 0")
    if init == "mica":
        return np.zeros(shape_A), np.linalg.svd(W, full_matrices=False)[0][:, -r:]
    if init == "olora":
        Q, R = np.linalg.qr(W)
        return R[:r], Q[:, :r]
    if init == "eva":
        return components(options, r), np.zeros(shape_B)
    if init == "corda":
        return corda(W, options, r, s)
    if init == "lora_ga":
        U, _, Vt = np.linalg.svd(options["dy"].T @ options["x"], full_matrices=False)
        if 2 * r > len(Vt):
            raise ValueError(f"lora_ga needs 2 r <= min(in, out), r = {r}")
        if options.get("direction") == "ArB2r":  # A gets the first r of the 2 r directions, and not the second
            U, Vt = np.roll(U[:, : 2 * r], r, 1), np.roll(Vt[: 2 * r], r, 0)
        return Vt[r : 2 * r] * out**0.25 / 16, U[:, :r] * out**0.25 / 16
    if init == "pissa":
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
    elif init == "loftq":
        U, S, Vt = np.linalg.svd(W - quantised(W, options["bits"]), full_matrices=False)
        for _ in range(options["iterations"] - 1):
            X = W - (U[:, :r] * S[:r]) @ Vt[:r]
            U, S, Vt = np.linalg.svd(W - quantised(X, options["bits"]), full_matrices=False)
        options["Q"] = quantised(W if options["iterations"] == 1 else X, options["bits"])
    else:
        U, S, Vt = sketched(W, r, int(str(init).removeprefix("pissa_niter_")), rng)
    root = (S[:r] / s) ** 0.5
    return root[:, None] * Vt[:r], U[:, :r] * root


def sketched(W: Array, r: int, iterations: int, rng: Any) -> Any:
    """The leading singular triples (U, S, V^T), by subspace iteration from r + 4 random columns."""
    Q = np.linalg.qr(W @ rng.standard_normal((W.shape[1], min(r + 4, *W.shape))))[0]
    for _ in range(iterations):
        Q = np.linalg.qr(W @ (W.T @ Q))[0]
    U, S, Vt = np.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vt


def quantised(W: Array, bits: int) -> Array:
    """W in NormalFloat: each number becomes its block's largest absolute value, times the nearest code.

    A block is 64 numbers in a row. The 2^bits codes are normal quantiles, scaled to [-1, 1], with 0 among them.

    Source: QLoRA, arXiv 2305.14314, section 3.
    """
    n, offset = 2**bits, 0.9677083
    high, low = norm.ppf(np.linspace(offset, 0.5, n // 2 + 1)[:-1]), norm.ppf(np.linspace(offset, 0.5, n // 2)[:-1])
    codes = np.sort([*high, 0.0, *-low]) / max(high)
    blocks = np.pad(W.ravel(), (0, -W.size % 64)).reshape(-1, 64)
    scale = np.maximum(abs(blocks).max(1, keepdims=True), 2.0**-120)
    nearest = abs((blocks / scale)[..., None] - codes).argmin(-1)
    return (codes[nearest] * scale).ravel()[: W.size].reshape(W.shape)


def corda(W: Array, options: Any, r: int, s: float) -> tuple[Array, Array]:
    """s B A = U S V^T C^-1 over r triples of W C, the largest ("ipm") or the smallest ("kpm").

    C (in, in) is the mean of X^T X over the inputs X (tokens, in), each divided by its largest absolute value. A
    multiple of the mean of its diagonal is added until C^-1 is accurate.
    """
    C = np.zeros((W.shape[1], W.shape[1]))
    for X in options["inputs"]:
        X = X / (abs(X).max() or 1.0)
        C += X.T @ X / len(options["inputs"])
    damp = 0.01
    while True:
        damped = C + damp * np.diag(C).mean() * np.eye(len(C))
        inverse = np.linalg.inv(damped)
        if np.linalg.norm(damped @ inverse - np.eye(len(C))) < 0.05:
            break
        damp *= 2
    U, S, Vt = np.linalg.svd(W @ damped, full_matrices=False)
    at = slice(0, r) if options["method"] == "ipm" else slice(len(S) - r, len(S))
    root = (S[at] / s) ** 0.5
    return root[:, None] * (Vt[at] @ inverse), U[:, at] * root


def components(options: Any, r: int) -> Array:
    """The r leading principal components of all inputs, as rows (r, in).

    "whiten" divides each by the square root of its singular value.
    """
    X = np.concatenate([x.reshape(-1, x.shape[-1]) for x in options["inputs"]])
    _, S, Vt = np.linalg.svd(X - X.mean(0), full_matrices=False)
    return Vt[:r] / S[:r, None] ** 0.5 if options.get("whiten") else Vt[:r]


# -- one layer ---------------------------------------------------------------------------------


@dataclasses.dataclass
class Adapter:
    """One adapter in one layer.

    Attributes:
        A, B: (r, in) and (out, r).
        s, first_s: the scaling now, and as the configuration gives it.
        started: A and B before training.
        moved: what its init subtracts from the weight, in the orientation of `Site.W`; None where it subtracts nothing.
    """

    A: Array
    B: Array
    r: int
    alpha: float
    s: float
    first_s: float
    dropout: float
    init: bool | str
    started: tuple[Array, Array]
    moved: Array | None = None


class Site:
    """A layer of any kind, with adapters by name.

    Attributes:
        W, b: the frozen weight as it is stored, and the bias.
        fine: the dtype of A and B, which is at least float32.
        copies: {adapter: [W, b]}: trained copies of the layer itself (modules_to_save).
        merged: the names of the merged adapters.
        held: the weight with their updates in it. `W` stays as it is, so unmerging is exact.
    """

    def __init__(self, kind: str, W: Array, b: Array | None, dtype: str, geometry: LayerSpec | None = None) -> None:
        self.kind, self.dtype, self.geometry = kind, dtype, geometry
        self.base = geometry.base if geometry is not None else {}
        self.groups = self.base.get("groups", 1)
        self.parts = geometry.parts if geometry is not None else ()
        self.fine = "float64" if dtype == "float64" else "float32"
        self.W = rounded(self.side(W), dtype)
        self.b = None if b is None else rounded(b, dtype)
        self.adapters: dict[str, Adapter] = {}
        self.copies: dict[str, list[Any]] = {}
        self.active: list[str] = ["default"]
        self.merged: list[str] = []
        self.enabled = True
        self.held = self.W

    def side(self, W: Array) -> Array:
        """A weight from (out, in) to the stored orientation, or from there to (out, in)."""
        return W.T if self.kind in ON_ITS_SIDE else W

    def add(self, name: str, r: int, alpha: float, config: Mapping[str, Any], options: Any, rng: Any) -> Adapter:
        """A new adapter for this layer. The caller enters it in `adapters`."""
        s = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
        init, options = config.get("init_lora_weights", True), dict(options or {})
        A, B = start(init, self.seen(), self.kind, r * sum(self.parts) or r, s, options, rng)
        A, B = rounded(A, self.fine), rounded(B * self.owned(r), self.fine)
        dropout = config.get("lora_dropout", 0.0)
        made = Adapter(A, B, r, alpha, s, s, dropout, init, (A, B))
        if "Q" in options:
            Q = rounded(self.side(options["Q"]), self.dtype)
            U, S, Vt = np.linalg.svd(self.side(self.W - Q), full_matrices=False)  # W - Q, with Q as the dtype stores it
            root = (S[:r] / s) ** 0.5
            made.A, made.B = (rounded(v, self.fine) for v in (root[:, None] * Vt[:r], U[:, :r] * root))
            made.moved = self.W - Q
        elif str(init).lower().startswith(("pissa", "olora", "corda", "lora_ga")):
            made.moved = self.W - rounded(self.W - self.delta(made), self.dtype)
        return made

    def seen(self) -> Array:
        """The weight (out, in) that A and B are made for: A sees the inputs of all groups of a convolution."""
        W = self.side(self.W)
        return np.repeat(W, self.groups, 1) if self.groups > 1 else W

    def owned(self, r: int) -> Any:
        """Where B may differ from 0: at the outputs of the part that a column of B belongs to; 1.0: everywhere."""
        if not self.parts:
            return 1.0
        here = np.zeros((len(self.side(self.W)), r * sum(self.parts)))
        size = len(here) // len(self.parts)
        for column, part in enumerate(part for part, adapted in enumerate(self.parts) if adapted):
            here[part * size : (part + 1) * size, column * r : (column + 1) * r] = 1
        return here

    def delta(self, adapter: Adapter) -> Array:
        """s B A in the orientation of `W`."""
        if MESH.get(self.kind):
            return adapter.s * np.tensordot(adapter.B, adapter.A, 1)
        return adapter.s * self.side(adapter.B @ adapter.A)

    def shifted(self, names: Iterable[str]) -> Array:
        """W minus what the inits of these adapters subtract."""
        moved = [m for n in names if n in self.adapters and (m := self.adapters[n].moved) is not None]
        return rounded(self.W - np.sum(moved, 0), self.dtype) if moved else self.W

    def weight(self) -> Array:
        """The weight of the base layer now, in the orientation of `W`."""
        return self.held if self.merged else self.shifted(self.active)

    def forward(self, x: Array, names: Sequence[str] | None = None, rng: Any = None) -> Array:
        """y = W x + b, plus s B A x for each of the named adapters that is not merged.

        Args:
            x: (*tokens, in); integers (*tokens,) for an embedding; (batch, in, *size) for a convolution.
            names: the adapters; None: the active ones.
            rng: draws the dropout. None: evaluation.
        """
        if names is None:
            names = self.active if self.enabled else []
        W, b = self.held if self.merged and self.enabled else self.shifted(names), self.b
        for name in names:
            W, b = self.copies.get(name, (W, b))
        y = self.plain(x, W, b)
        y = y * self.base.get("hook", 1.0)
        for name in names:
            if name in self.adapters and name not in self.merged:
                y = y + self.branch(x, self.adapters[name], rng)
        return rounded(y, self.dtype)

    def plain(self, x: Array, W: Array, b: Array | None) -> Array:
        """W x + b, for W in the stored orientation."""
        bias = 0.0 if b is None else b
        if self.kind == "norm":
            return W * x + bias
        if self.kind == "embedding":
            return W[x] * self.base.get("embed_scale", 1.0)
        if MESH.get(self.kind):
            return np.moveaxis(self.convolved(x, W) + bias, -1, 1)
        return x @ (W if self.kind == "transposed" else turned(W)) + bias

    def branch(self, x: Array, adapter: Adapter, rng: Any) -> Array:
        """s B A x, with dropout on x where rng is given."""
        A, B, p = adapter.A, adapter.B, adapter.dropout
        if self.kind == "embedding":
            return adapter.s * (A.T[x] @ B.T) * self.base.get("embed_scale", 1.0)
        if rng is not None and p > 0:
            x = self.dropped(x, p, rng)
        if MESH.get(self.kind):
            return adapter.s * np.moveaxis(self.convolved(x, A) @ B.T, -1, 1)
        return adapter.s * (x @ turned(A) @ turned(B))

    def dropped(self, x: Array, p: float, rng: Any) -> Array:
        """Each number of x is 0 with probability p, else x / (1 - p)."""
        x = x * (rng.random(x.shape) >= p) / (1 - p) if p < 1 else 0 * x
        return x

    def windows(self, x: Array, kernel: Sequence[int]) -> Array:
        """All parts of x under the kernel: (batch, in, *size) to (batch, in, *places, *kernel)."""
        g, d = self.geometry, len(kernel)
        assert g is not None
        stride, padding, dilation = (g.along(name) for name in ("stride", "padding", "dilation"))
        x = np.pad(x, [(0, 0), (0, 0), *[(p, p) for p in padding]], PADDED[self.base.get("padding_mode", "zeros")])
        span = [step * (k - 1) + 1 for k, step in zip(kernel, dilation, strict=True)]
        every = (slice(None), slice(None), *[slice(None, None, step) for step in (*stride, *dilation)])
        return sliding_window_view(x, span, tuple(range(2, 2 + d)))[every]

    def convolved(self, x: Array, W: Array) -> Array:
        """The convolution of x with W (out, in, *kernel): (batch, *places, out).

        In groups, W is (out, in / groups, *kernel), and each part of the outputs sees its part of the inputs.
        """
        if x.shape[1] > W.shape[1]:
            parts = zip(np.split(x, self.groups, 1), np.split(W, self.groups), strict=True)
            return np.concatenate([self.convolved(*part) for part in parts], -1)
        seen, d = self.windows(x, W.shape[2:]), W.ndim - 2
        return np.tensordot(seen, W, ([1, *range(2 + d, 2 + 2 * d)], list(range(1, 2 + d))))

    def merge(self, names: Sequence[str], safe: bool) -> tuple[Array, list[str]]:
        """The weight with the updates of these adapters added, and the names of all merged adapters.

        The layer does not change: the caller enters both in `held` and `merged`.

        Raises:
            ValueError: safe, and the weight has NaN or infinite numbers.
        """
        new = [name for name in names if name in self.adapters and name not in self.merged]
        if not new:
            return self.held, self.merged
        if self.groups > 1:
            raise ValueError("A sees the inputs of all groups: there is no weight of one group for its update")
        if self.base.get("parametrized"):
            raise ValueError("W is computed from other parameters: nothing can be added to it")
        everything = [*self.merged, *new]
        held = self.shifted(dict.fromkeys([*self.active, *everything]))
        held = rounded(sum((self.delta(self.adapters[name]) for name in everything), held), self.dtype)
        if safe and not np.isfinite(held).all():
            raise ValueError("the merged weight would not be finite")
        return held, everything

    def unmerge(self) -> None:
        self.merged = []

    def grad(self, x: Array, dy: Array, rng: Any = None) -> dict[str, Array | None]:
        """The gradients of L with respect to x, and to A and B of the adapter "default", from dy = dL/dy.

            dL/dA = s B^T (dy x^T)        dL/dB = s (dy x^T) A^T        dL/dx = (W + s B A)^T dy

        rng: draws the same dropout mask as `forward`. A and B have no gradient while they are merged or disabled.
        """
        W, acting = self.side(self.weight() if self.enabled else self.W), self.enabled and not self.merged
        adapter = self.adapters["default"]
        A, B = adapter.A, adapter.B
        total = W + self.side(self.delta(adapter)) if acting else W
        mask: Any = None
        if rng is not None and adapter.dropout and acting and self.kind != "embedding":
            mask = self.dropped(np.ones_like(x), adapter.dropout, rng)
            x = x * mask
        if self.kind == "embedding":
            dx, dW = None, np.zeros_like(W)
            dy = dy * self.base.get("embed_scale", 1.0)
            if self.base.get("scale_grad_by_freq"):
                dy = dy / np.bincount(x.ravel())[x][..., None]
            np.add.at(dW.T, x, dy)
        elif MESH.get(self.kind):
            d = W.ndim - 2
            axes = [0, *range(2, 2 + d)]
            dW = np.tensordot(dy, self.windows(x, W.shape[2:]), (axes, axes))
            dx = self.back(x, dy, total)
        else:
            dx = dy @ total
            dW = turned(dy) @ x if self.kind == "experts" else dy.reshape(-1, len(W)).T @ x.reshape(-1, W.shape[1])
        if not acting:
            return {"x": dx, "A": None, "B": None, "W": None, "b": None}
        if MESH.get(self.kind):
            dA = np.tensordot(B.T, dW, 1)
            dB = dW.reshape(len(dW), -1) @ A.reshape(len(A), -1).T
        else:
            dA, dB = turned(B) @ dW, dW @ turned(A)
        if self.geometry is not None and self.geometry.padding_idx is not None:
            dA[:, self.geometry.padding_idx] = 0
        if mask is not None:  # the mask acts on the branch, not on W x
            around = self.back(x, dy, W) if MESH.get(self.kind) else dy @ W
            dx = around + mask * (dx - around)
        frozen = adapter.init == "mica"
        dB = dB * self.owned(adapter.r)
        return {"x": dx, "A": adapter.s * dA, "B": None if frozen else adapter.s * dB, "W": None, "b": None}

    def pulled(self, x: Array, dy: Array) -> tuple[Array, dict[str, Array]]:
        """dL/dx and the gradients of all that acts in a module of a model, from dy = dL/dy; x (batch, in).

        The keys: "A:adapter" and "B:adapter", "weight" and "bias", with ":adapter" where a copy acts instead.
        """
        names = list(self.active) if self.enabled else []
        W, owner = self.held if self.merged and self.enabled else self.shifted(names), ""
        for name in names:
            if name in self.copies:
                W, owner = self.copies[name][0], f":{name}"
        W = self.side(W)
        acting = {name: self.adapters[name] for name in names if name in self.adapters and name not in self.merged}
        if self.kind == "norm":
            dx, dW = dy * W, (dy * x).sum(0)
        elif self.kind == "embedding":
            dx, dW = dy, np.zeros_like(W)
            np.add.at(turned(dW), x, dy)
        else:
            dx, dW = dy @ sum((self.side(self.delta(a)) for a in acting.values()), W), dy.T @ x
        found = {f"weight{owner}": dW, f"bias{owner}": dy.sum(0)}
        for name, a in acting.items():
            found |= {f"A:{name}": a.s * a.B.T @ dW, f"B:{name}": a.s * dW @ a.A.T}
        return dx, found

    def back(self, x: Array, dy: Array, W: Array) -> Array:
        """dL/dx of a convolution."""
        g, kernel = self.geometry, W.shape[2:]
        assert g is not None
        stride, padding, dilation = (g.along(name) for name in ("stride", "padding", "dilation"))
        dx = np.pad(np.zeros_like(x), [(0, 0), (0, 0), *[(p, p) for p in padding]])
        for at in np.ndindex(*kernel):
            place = [
                slice(a * d, a * d + (n - 1) * step + 1, step)
                for a, n, d, step in zip(at, dy.shape[2:], dilation, stride, strict=True)
            ]
            dx[:, :, *place] += np.einsum("bo...,oi->bi...", dy, W[:, :, *at])
        return dx[:, :, *[slice(p, n - p) for n, p in zip(dx.shape[2:], padding, strict=True)]]

    def state(self, name: str) -> LayerState:
        """The weight, bias, factors and scaling, in logical orientation."""
        a = self.adapters[name]
        b = None if self.b is None else self.b.copy()
        return LayerState(self.side(self.weight()).copy(), b, a.A.copy(), a.B.copy(), float(a.s))

    def write(self, name: str, A: Array, B: Array) -> None:
        """Set A and B. ValueError: another shape."""
        adapter = self.adapters[name]
        if A.shape != adapter.A.shape or B.shape != adapter.B.shape:
            raise ValueError(f"A and B are {adapter.A.shape} and {adapter.B.shape}")
        B = B * self.owned(adapter.r)
        adapter.A, adapter.B = rounded(A, self.fine), rounded(B, self.fine)


class PlainLayer(Layer):
    """One layer with one adapter."""

    def __init__(self, spec: LayerSpec) -> None:
        config = {name: getattr(spec, name) for name in ("use_rslora", "lora_dropout", "init_lora_weights", "r")}
        checked(
            {**config, "lora_alpha": spec.lora_alpha, "target_modules": ["layer"], "loftq_config": spec.init_options}
        )
        if spec.base.get("max_norm") is not None:
            raise ValueError("an embedding with max_norm rewrites its rows while it looks them up")
        if spec.r % spec.base.get("groups", 1):
            raise ValueError("r must be a multiple of groups")
        if spec.lora_dropout and spec.kind in ("parameter", "experts"):
            raise ValueError("a raw parameter has no dropout")
        self.site = Site(spec.kind, spec.W, spec.b, spec.dtype, spec)
        rng = np.random.default_rng(spec.seed)
        made = self.site.add("default", spec.r, spec.lora_alpha, config, spec.init_options, rng)
        self.site.adapters["default"] = made

    def read(self) -> LayerState:
        return self.site.state("default")

    def forward(self, x: Array, train: bool = False, seed: int = 0) -> Array:
        return self.site.forward(x, rng=self.drawn(seed) if train else None)

    def update(self) -> Array:
        return self.site.side(self.site.delta(self.site.adapters["default"]))

    def drawn(self, seed: int) -> np.random.Generator:
        """The generator of a dropout mask."""
        return np.random.default_rng(seed)

    def write(self, A: Array, B: Array) -> None:
        self.site.write("default", A, B)

    def merge(self, safe: bool = False) -> None:
        self.site.held, self.site.merged = self.site.merge(["default"], safe)

    def unmerge(self) -> None:
        self.site.unmerge()

    def merged_copy(self) -> tuple[Array, Array | None]:
        W, _ = self.site.merge(["default"], False)
        return self.site.side(W), self.site.b

    def enable(self, enabled: bool) -> None:
        self.site.enabled = enabled

    def rescale(self, how: str, factor: float | None) -> None:
        a = self.site.adapters["default"]
        if factor is None:
            a.s = a.first_s
        else:
            a.s = {"set": a.first_s * factor, "scale": a.s * factor, "unscale": a.s / factor}[how]

    def grad(self, x: Array, dy: Array, train: bool = False, seed: int = 0) -> dict[str, Array | None]:
        return self.site.grad(x, dy, self.drawn(seed) if train else None)

    def trainable(self) -> set[str]:
        return {"A"} if self.site.adapters["default"].init == "mica" else {"A", "B"}


# -- names -------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {
    "r": 8, "lora_alpha": 8, "target_modules": None, "exclude_modules": None, "modules_to_save": None,
    "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {}, "alpha_pattern": {},
    "target_parameters": None, "bias": "none", "use_rslora": False, "lora_dropout": 0.0, "init_lora_weights": True,
    "fan_in_fan_out": False, "loftq_config": {}, "eva_config": {}, "inference_mode": False, "task_type": None,
}  # fmt: skip
ALSO_READ = {"peft_type", "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "runtime_config"}


def checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the default of each option that it lacks.

    Raises:
        ValueError: an option that does not exist, a value that it cannot have, or two options that exclude each other.
    """
    if unknown := config.keys() - OPTIONS.keys():
        raise ValueError(f"there is no option {', '.join(sorted(unknown))}")
    c = OPTIONS | {name: value for name, value in config.items()}
    init = c["init_lora_weights"]
    for r in (c["r"], *(c["rank_pattern"] or {}).values()):
        if not isinstance(r, int) or isinstance(r, bool) or r <= 0:
            raise ValueError(f"r must be an integer above 0, not {r!r}")
    for alpha in (c["lora_alpha"], *(c["alpha_pattern"] or {}).values()):
        if not math.isfinite(alpha):
            raise ValueError(f"lora_alpha must be finite, not {alpha!r}")
    if not 0 <= c["lora_dropout"] <= 1:
        raise ValueError(f"lora_dropout must be in [0, 1], not {c['lora_dropout']!r}")
    if c["bias"] not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be 'none', 'all' or 'lora_only', not {c['bias']!r}")
    known = isinstance(init, bool) or str(init).lower() in INITS or re.fullmatch(r"pissa_niter_\d+", str(init).lower())
    if not known:
        raise ValueError(f"init_lora_weights must be True, False or one of {', '.join(INITS)}, not {init!r}")
    if str(init).lower() == "loftq" and not c["loftq_config"]:
        raise ValueError("loftq needs a loftq_config")
    eva = {"rho": 1.0, "tau": 0.99} | (c["eva_config"] or {})
    if eva["rho"] < 1 or not 0 <= eva["tau"] <= 1:
        raise ValueError(f"eva_config needs rho >= 1 and tau in [0, 1], not {eva}")
    if c["layers_to_transform"] is not None and isinstance(c["target_modules"], str):
        raise ValueError("layers_to_transform needs a list of target_modules")
    if c["layers_pattern"] and c["layers_to_transform"] is None:
        raise ValueError("layers_pattern needs layers_to_transform")
    if c["target_parameters"] is not None and c["lora_dropout"]:
        raise ValueError("target_parameters cannot have lora_dropout")
    if not c["target_modules"] and not c["target_parameters"]:
        raise ValueError("target_modules is needed")
    return c


def ends(name: str, items: Iterable[str]) -> bool:
    """Is the name one of these, or does it end in "." and one of these?"""
    return any(name == item or name.endswith("." + item) for item in items)


def named(name: str, rule: str | Iterable[str] | None) -> bool:
    """Does the rule name this module? A string is a regular expression for the full name; for a list see `ends`."""
    if isinstance(rule, str):
        return re.fullmatch(rule, name) is not None
    return ends(name, rule or [])


def in_layer(name: str, c: Mapping[str, Any]) -> bool:
    """Is the module in one of the layers of layers_to_transform?

    Its layer is the first number in its name after another part, or after layers_pattern where there is one.
    """
    wanted = c["layers_to_transform"]
    if wanted is None or wanted == []:
        return True
    patterns = [c["layers_pattern"]] if isinstance(c["layers_pattern"], str) else c["layers_pattern"] or []
    found = re.match(r"(?:[^.]*\.)+?(\d+)\.", name)
    for pattern in patterns:
        if found := re.match(rf"(?:^|.*?\.)(?:{pattern})\.(\d+)\.", name):
            break
    return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def looked_up(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first key of rank_pattern or alpha_pattern that matches; without one, the default.

    A key is a regular expression for the name, or for its end after a dot.
    """
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def saved(names: Iterable[str], c: Mapping[str, Any]) -> list[str]:
    """The modules that modules_to_save names, and the modules inside them."""
    parts = {name: name.split(".") for name in names}
    return [
        n
        for n, p in parts.items()
        if any(ends(".".join(p[: i + 1]), c["modules_to_save"] or []) for i in range(len(p)))
    ]


def targets(kinds: Mapping[str, str], c: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
    """{module: (r, lora_alpha)} of the modules that get an adapter.

    Args:
        kinds: {module: kind} of the model.

    Raises:
        ValueError: no module is named, or one that cannot be adapted.
    """
    rule, found, keep = c["target_modules"], [], saved(kinds, c)
    containers = {".".join(n.split(".")[:i]) for n in kinds for i in range(1, n.count(".") + 1)}
    for name in [*kinds, *sorted(containers - kinds.keys())]:
        kind = kinds.get(name, "container")
        if named(name, c["exclude_modules"]) or name in keep:
            continue
        if kind == "container" and any(k in keep for k in kinds if k.startswith(name + ".")):
            continue
        if isinstance(rule, str) and rule.lower() == "all-linear":
            wanted = kind in LINEAR
        else:
            wanted = named(name, rule) and in_layer(name, c)
        if wanted and kind not in (*LINEAR, "embedding", "conv1d", "conv2d", "conv3d"):
            raise ValueError(f"{name} is a {kind}, which cannot be adapted")
        if wanted:
            found.append(name)
    whole = {name: name for name in found}
    whole |= {
        n: f"{n}.weight"
        for n, k in kinds.items()
        if k != "norm"
        and ends(f"{n}.weight", c["target_parameters"] or [])
        and not any(named(x, c["exclude_modules"]) for x in (n, f"{n}.weight"))
        and in_layer(f"{n}.weight", c)
    }
    if not whole:
        raise ValueError("the configuration names no module")
    rank, alpha = c["rank_pattern"], c["alpha_pattern"]
    return {n: (looked_up(rank, full, c["r"]), looked_up(alpha, full, c["lora_alpha"])) for n, full in whole.items()}


# -- a model -----------------------------------------------------------------------------------


class PlainModel(Model):
    """A chain of layers with named adapters: the output of each is the input of the next.

    Attributes:
        sites: {module: its Site}.
        configs: {adapter: its configuration, with all options}.
        trains: the adapters whose parameters train.
    """

    def __init__(self, spec: ModelSpec, empty: bool = False) -> None:
        self.dtype, self.rng = spec.dtype, np.random.default_rng(spec.seed)
        self.sites: dict[str, Site] = {}
        for name, m in spec.modules.items():
            geometry = LayerSpec(m.kind, m.W) if MESH.get(m.kind) else None
            self.sites[name] = Site(m.kind, m.W, m.b, spec.dtype, geometry)
        self.order, self.same, self.encoders = list(spec.order or spec.modules), dict(spec.same), spec.encoders
        for name, other in spec.tied.items():
            self.sites[name].W = self.sites[name].held = self.sites[other].W
        self.configs: dict[str, dict[str, Any]] = {}
        self.trains: set[str] = set()
        self.enabled = True
        self.mode = True  # training, as a torch model begins
        if not empty:
            self.add("default", spec.config)
            self.set(["default"])

    def kinds(self) -> dict[str, str]:
        return {name: site.kind for name, site in self.sites.items()}

    def add(self, adapter: str, config: Mapping[str, Any]) -> None:
        c = checked(config)
        if adapter in self.configs or not adapter or "." in adapter or adapter == "__base__":
            raise ValueError(f"{adapter!r} is there already, or cannot be a name")
        if c["bias"] != "none" and any(other["bias"] != "none" for other in self.configs.values()):
            raise ValueError("only one adapter can train biases")
        loftq = c["loftq_config"] or {}
        if str(c["init_lora_weights"]).lower() == "corda":
            raise ValueError("corda needs inputs")
        options = {"bits": loftq.get("loftq_bits", 4), "iterations": loftq.get("loftq_iter", 1)}
        if str(c["init_lora_weights"]).lower() in ("eva", "lora_ga"):
            c["init_lora_weights"] = True  # `look` reads the data later
        found = targets(self.kinds(), c)
        made = {n: self.sites[n].add(adapter, r, alpha, c, options, self.rng) for n, (r, alpha) in found.items()}
        for name, one in made.items():
            self.sites[name].adapters[adapter] = one
        for name in saved(self.sites, c):
            site = self.sites[name]
            site.copies[adapter] = [site.W.copy(), None if site.b is None else site.b.copy()]
        self.configs[adapter] = c

    def known(self, adapters: Iterable[str]) -> list[str]:
        """The same names. ValueError: one that does not exist."""
        adapters = list(adapters)
        for adapter in adapters:
            if adapter not in self.configs:
                raise ValueError(f"there is no adapter {adapter!r}")
        return adapters

    def adapted(self, adapter: str = "default") -> dict[str, tuple[int, float]]:
        self.known([adapter])
        here = {name: site.adapters[adapter] for name, site in self.sites.items() if adapter in site.adapters}
        return {name: (a.r, float(a.s)) for name, a in here.items()}

    def read(self, module: str, adapter: str = "default") -> LayerState:
        return self.sites[module].state(adapter)

    def write(self, module: str, A: Array, B: Array, adapter: str = "default") -> None:
        self.sites[module].write(adapter, A, B)

    def train(self, mode: bool) -> None:
        self.mode = mode

    def training(self) -> bool:
        return self.mode

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        before = self.enabled
        self.enable(False)
        try:
            yield
        finally:
            self.enable(before)

    def rescale(self, adapter: str, factor: float) -> None:
        self.known([adapter])
        if adapter in [name for site in self.sites.values() for name in site.merged]:
            raise ValueError(f"{adapter} is merged: its scaling cannot change")
        for a in [site.adapters[adapter] for site in self.sites.values() if adapter in site.adapters]:
            a.s = factor * a.first_s

    @contextlib.contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        if any(site.merged for site in self.sites.values()):
            raise ValueError("the scaling of a merged adapter cannot change: unmerge first")
        acting = [a for site in self.sites.values() for name, a in site.adapters.items() if name in site.active]
        before = [a.s for a in acting]
        try:
            for a in acting:
                a.s = a.s * factor
            yield
        finally:
            for a, s in zip(acting, before, strict=True):
                a.s = s

    def forward(
        self, x: Array, train: bool | None = False, seed: int = 0, adapter_names: Sequence[str] | None = None
    ) -> Array:
        train = self.mode if train is None else train
        rng = np.random.default_rng(seed) if train else None
        if adapter_names is None:
            return self.called(x, None, rng)
        names = list(adapter_names)
        self.known(name for name in names if name != "__base__")
        if len(names) != len(x) or train or not self.enabled or any(site.merged for site in self.sites.values()):
            raise ValueError("adapter_names: one for each sample, in evaluation, switched on and not merged")
        rows = []
        for name, row in zip(names, x, strict=True):
            rows.append(self.called(row[None], [] if name == "__base__" else [name]))
        return np.concatenate(rows)

    def called(self, x: Array, names: Sequence[str] | None, rng: Any = None) -> Array:
        """The output of the modules, in the order in which the model calls them, each by one of its names."""
        for step in self.order:
            name = self.same.get(step, step)
            x = self.encoded(step, x, names, rng) if step in self.encoders else self.sites[name].forward(x, names, rng)
        return x

    def encoded(self, encoder: str, x: Array, names: Sequence[str] | None, rng: Any) -> Array:
        """The output of a TransformerEncoderLayer over one token, whose attention gives back its input."""
        h = rounded(normalised(2 * x), self.dtype)
        inner = np.maximum(self.sites[f"{encoder}.linear1"].forward(h, names, rng), 0)
        return rounded(normalised(h + self.sites[f"{encoder}.linear2"].forward(inner, names, rng)), self.dtype)

    def biased(self, adapter: str) -> list[str]:
        """The modules whose bias trains with this adapter: none, all, or those that it adapts."""
        mode = self.configs[adapter]["bias"]
        there = [name for name, site in self.sites.items() if site.b is not None and mode != "none"]
        return [name for name in there if mode == "all" or adapter in self.sites[name].adapters]

    def trainable(self) -> set[str]:
        found = set()
        for adapter in self.trains if self.enabled else ():
            found |= {f"{name}.bias" for name in self.biased(adapter)}
            if self.configs[adapter]["bias"] == "all":
                holders = [name.rpartition(".")[0] for name, site in self.sites.items() if site.kind == "attention"]
                found |= {f"{holder}.in_proj_bias" for holder in holders}
            for name, site in self.sites.items():
                if adapter in site.adapters:
                    found |= {f"{name}.A:{adapter}"}
                    found |= {f"{name}.B:{adapter}"} if site.adapters[adapter].init != "mica" else set()
                if adapter in site.copies:
                    found |= {f"{name}.weight:{adapter}"}
                    found |= {f"{name}.bias:{adapter}"} if site.b is not None else set()
        return found

    def grad(self, x: Array, dy: Array) -> dict[str, Array]:
        seen = []
        for site in self.sites.values():
            seen.append(x)
            x = site.forward(x)
        found: dict[str, Array] = {}
        for (name, site), x in reversed(list(zip(self.sites.items(), seen, strict=True))):
            dy, here = site.pulled(x, dy)
            found |= {f"{name}.{key}": value for key, value in here.items()}
        return {key: found[key] for key in self.trainable() & found.keys()}

    def write_base(self, module: str, W: Array | None = None, b: Array | None = None) -> None:
        site = self.sites[module]
        copies = [site.copies[name] for name in site.active if name in site.copies]
        if W is not None:
            stored = rounded(site.side(W), self.dtype)
            if copies:
                copies[0][0] = stored
            else:
                site.W = stored
        if b is not None:
            if copies:
                copies[0][1] = rounded(b, self.dtype)
            else:
                site.b = rounded(b, self.dtype)

    def base(self) -> dict[str, tuple[Array, Array | None]]:
        return {n: (s.side(s.weight()).copy(), None if s.b is None else s.b.copy()) for n, s in self.sites.items()}

    def merge(self, adapters: Sequence[str] | None = None, safe: bool = False) -> None:
        names = self.active() if adapters is None else self.known(adapters)
        made = {name: site.merge(names, safe) for name, site in self.sites.items()}
        for name, (held, merged) in made.items():
            self.sites[name].held, self.sites[name].merged = held, merged

    def unmerge(self) -> None:
        for site in self.sites.values():
            site.unmerge()

    def enable(self, enabled: bool) -> None:
        self.enabled = enabled
        for site in self.sites.values():
            site.enabled = enabled

    def set(self, adapters: Sequence[str]) -> None:
        names = self.known(adapters)
        if not names:
            raise ValueError("give at least one adapter")
        if any(sum(name in site.copies for name in names) > 1 for site in self.sites.values()):
            raise ValueError("modules_to_save: only one adapter can be active")
        self.unmerge()
        self.trains = set(names)
        for site in self.sites.values():
            site.active = list(names)

    def active(self) -> list[str]:
        return list(next(iter(self.sites.values())).active)

    def delete(self, adapter: str) -> None:
        self.known([adapter])
        if any(adapter in site.merged for site in self.sites.values()):
            raise ValueError(f"{adapter} is merged: unmerge first")
        left = [name for name in self.active() if name != adapter]
        del self.configs[adapter]
        for site in self.sites.values():
            site.adapters.pop(adapter, None)
            site.copies.pop(adapter, None)
            site.active = left or list(self.configs)[:1]
        self.trains = set(self.active()) if adapter in self.trains else self.trains

    def combine(self, adapters: Sequence[str], weights: Sequence[float], name: str, how: str) -> None:
        self.known(adapters)
        if name in self.configs or not name or "." in name or not adapters or len(adapters) != len(weights):
            raise ValueError(f"{name!r} is there already, or adapters and weights are not as many")
        if how not in ("cat", "svd", "linear"):
            raise ValueError(f"how must be 'cat', 'svd' or 'linear', not {how!r}")
        if any(self.configs[adapter]["modules_to_save"] for adapter in adapters):
            raise ValueError("modules_to_save cannot be combined")
        made = {}
        for module, site in self.sites.items():
            pairs = [(w, site.adapters[n]) for n, w in zip(adapters, weights, strict=True) if n in site.adapters]
            if pairs:
                made[module] = combined(site, pairs, how)
        for module, one in made.items():
            self.sites[module].adapters[name] = one
        r = max(one.r for one in made.values())
        plain = {"bias": "none", "init_lora_weights": True, "use_rslora": False, "modules_to_save": None}
        ranks = {f"^{re.escape(module)}": one.r for module, one in made.items()}
        c = {**OPTIONS, **plain, "r": r, "lora_alpha": r, "target_modules": list(made)}
        self.configs[name] = {**c, "rank_pattern": ranks, "alpha_pattern": ranks}

    def look(self, batches: Sequence[Array]) -> None:
        """EVA: A is made of principal components of the layer's inputs, and the ranks are distributed anew.

        The first rho r components of each layer are candidates. As many are chosen as the ranks sum to, by their share
        of the variance in their layer. A layer without a chosen component loses its adapter.

        Source: EVA, arXiv 2410.07170.
        """
        c = self.configs["default"]
        eva = {"rho": 1.0, "whiten": False, "adjust_scaling_factors": True} | c["eva_config"]
        here = {name: site for name, site in self.sites.items() if "default" in site.adapters and site.kind in LINEAR}
        seen: dict[str, list[Array]] = {name: [] for name in here}
        for x in batches:
            for name, site in self.sites.items():
                if name in here:
                    seen[name].append(x)
                x = site.forward(x, [])
        offers: list[tuple[float, str]] = []
        for name, site in here.items():
            X = np.concatenate(seen[name])
            S = np.linalg.svd(X - X.mean(0), compute_uv=False)
            most = round(site.adapters["default"].r * eva["rho"])
            offers += [(float(share), name) for share in (S**2 / (S**2).sum())[:most]]
        budget = sum(site.adapters["default"].r for site in here.values())
        chosen = [name for _, name in sorted(offers, reverse=True)[:budget]]
        ranks, alphas = {}, {}
        for name, site in here.items():
            a, rank = site.adapters.pop("default"), chosen.count(name)
            if not rank:
                continue
            A, B = rounded(components({"inputs": seen[name]} | eva, rank), site.fine), np.zeros((len(a.B), rank))
            alpha = a.alpha
            if eva["adjust_scaling_factors"]:
                alpha *= math.sqrt(rank / a.r) if c["use_rslora"] else rank / a.r
            s = alpha / (math.sqrt(rank) if c["use_rslora"] else rank)
            site.adapters["default"] = Adapter(A, B, rank, alpha, s, s, a.dropout, True, (A, B))
            ranks[f"^{re.escape(name)}"], alphas[f"^{re.escape(name)}"] = rank, alpha
        names = [name for name, site in self.sites.items() if "default" in site.adapters]
        self.configs["default"] = {**c, "target_modules": names, "rank_pattern": ranks, "alpha_pattern": alphas}

    def unload(self, merge: bool) -> dict[str, tuple[Array, Array | None]]:
        active = self.active()
        if merge:
            self.merge()
        found = {}
        for name, site in self.sites.items():
            W, b = site.held if merge and site.merged else site.W, site.b
            for adapter in active if merge else ():
                W, b = site.copies.get(adapter, (W, b))
            found[name] = site.side(W).copy(), None if b is None else b.copy()
        return found

    # -- files

    def converted(self, adapter: str) -> dict[str, Any]:
        """The configuration for a file.

        Where an init subtracts s B0 A0 from W, the file has twice the rank, and fits the original W:

            W - s B0 A0 + s B A  =  W + s [B | -B0] [A; A0]

        lora_alpha grows with the rank, so that s stays.

        Raises:
            ValueError: LoftQ, which subtracts W - Q and not a product.
        """
        c = dict(self.configs[adapter])
        mine = [site.adapters[adapter] for site in self.sites.values() if adapter in site.adapters]
        if any(a.init == "loftq" for a in mine):
            raise ValueError("loftq: the quantised weight is not in an adapter's file")
        if any(a.moved is not None for a in mine):
            root = 2**0.5 if c["use_rslora"] else 2
            c |= {"r": 2 * c["r"], "lora_alpha": root * c["lora_alpha"], "init_lora_weights": True}
            c["rank_pattern"] = {key: 2 * r for key, r in (c["rank_pattern"] or {}).items()}
            c["alpha_pattern"] = {key: root * alpha for key, alpha in (c["alpha_pattern"] or {}).items()}
        return c

    def tensors(self, adapter: str, embeddings: bool) -> dict[str, Array]:
        """{key: tensor} of the file, under PEFT's names.

        embeddings: with the base weights of adapted embeddings and of lm_head.
        """
        found: dict[str, Any] = {}
        for name, site in self.sites.items():
            place = f"base_model.model.{name}"
            if adapter in site.adapters:
                a = site.adapters[adapter]
                A, B = a.A, a.B
                if a.moved is not None:
                    A, B = np.concatenate([A, a.started[0]]), np.concatenate([B, -a.started[1]], 1)
                B = B.reshape(*B.shape, *[1] * MESH.get(site.kind, 0))  # of a convolution: (out, r, 1, ...)
                if site.kind == "embedding":
                    found |= {f"{place}.lora_embedding_A": A, f"{place}.lora_embedding_B": B}
                else:
                    found |= {f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}
                if embeddings and (site.kind == "embedding" or name.rpartition(".")[2] == "lm_head"):
                    found[f"{place}.base_layer.weight"] = site.W
            if name in self.biased(adapter):
                found[f"{place}.base_layer.bias" if adapter in site.adapters else f"{place}.bias"] = site.b
            if adapter in site.copies:
                W, b = site.copies[adapter]
                found |= {f"{place}.weight": W} | ({} if b is None else {f"{place}.bias": b})
        return found

    def embeddings(self, adapter: str) -> bool:
        """Does the file have the base weights of embeddings, where the caller does not say?"""
        return bool({"embed_tokens", "lm_head"} & set(self.configs[adapter]["target_modules"] or []))

    def save(self, folder: Path, **options: Any) -> None:
        if not options.get("safe_serialization", True):
            raise NotImplementedError("only safetensors")
        for adapter in self.known(options.get("selected_adapters") or list(self.configs)):
            place = Path(folder) if adapter == "default" else Path(folder) / adapter
            place.mkdir(parents=True, exist_ok=True)
            c = self.converted(adapter) | {"peft_type": "LORA", "inference_mode": True}
            forced = options.get("save_embedding_layers", "auto")
            tensors = self.tensors(adapter, self.embeddings(adapter) if forced == "auto" else forced)
            (place / "adapter_config.json").write_text(json.dumps(c, indent=2), encoding="utf-8")
            write_tensors(place / "adapter_model.safetensors", tensors, "F64" if self.dtype == "float64" else "F32")

    def save_converted(self, folder: Path, start: Path) -> None:
        self.save(folder)

    def save_own(self, folder: Path) -> None:
        self.save(folder)

    def load(self, folder: Path, adapter: str) -> None:
        given = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        strange = {
            k for k, v in given.items() if k not in OPTIONS and k not in ALSO_READ and v not in (None, False, {}, [])
        }
        strange -= {"qalora_group_size", "megatron_core", "corda_config", "lora_ga_config", "lora_bias"}
        if strange or given.get("lora_bias") or given.get("peft_type", "LORA") != "LORA":
            raise ValueError(f"the configuration has {', '.join(sorted(strange)) or 'another kind of adapter'}")
        config = {k: v for k, v in given.items() if k in OPTIONS and (v is not None or OPTIONS[k] is None)}
        tensors = read_tensors(Path(folder) / "adapter_model.safetensors")
        if config.get("init_lora_weights") not in (True, False):
            config["init_lora_weights"] = True  # the file replaces the first A and B
        before, rng = dict(self.configs), copy.deepcopy(self.rng)
        self.add(adapter, config)
        try:
            self.fill(adapter, tensors)
        except Exception:
            self.configs, self.rng = before, rng
            for site in self.sites.values():
                site.adapters.pop(adapter, None)
                site.copies.pop(adapter, None)
            raise
        finally:
            self.rng = rng  # the numbers of the file replace what was drawn

    def fill(self, adapter: str, tensors: Mapping[str, Array]) -> None:
        """Set the tensors of an adapter to those of a file.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape, or not finite.
        """
        want = self.tensors(adapter, any(key.endswith(".base_layer.weight") for key in tensors))
        if want.keys() != tensors.keys():
            wrong = sorted(want.keys() ^ tensors.keys())
            raise ValueError(f"missing or unknown tensors: {', '.join(wrong)}")
        for key, value in tensors.items():
            if value.shape != want[key].shape or not np.isfinite(value).all():
                raise ValueError(f"{key}: {value.shape} instead of {want[key].shape}, or not finite")
        for name, site in self.sites.items():
            place = f"base_model.model.{name}"
            letters = ("embedding_A", "embedding_B") if site.kind == "embedding" else ("A.weight", "B.weight")
            if adapter in site.adapters:
                A, B = (tensors[f"{place}.lora_{letter}"] for letter in letters)
                site.write(adapter, A, B.reshape(B.shape[:2]))
                site.adapters[adapter].started = site.adapters[adapter].A, site.adapters[adapter].B
            if f"{place}.base_layer.weight" in tensors:
                site.W = rounded(tensors[f"{place}.base_layer.weight"], self.dtype)
            if adapter in site.copies:
                b = tensors.get(f"{place}.bias")
                W = rounded(tensors[f"{place}.weight"], self.dtype)
                site.copies[adapter] = [W, None if b is None else rounded(b, self.dtype)]
            for key in (f"{place}.base_layer.bias", f"{place}.bias"):
                if key in tensors and adapter not in site.copies:
                    site.b = rounded(tensors[key], self.dtype)


def normalised(x: Array) -> Array:
    """(x - mean) / sqrt(variance + 1e-5) over the last dimension."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def combined(site: Site, pairs: Sequence[tuple[float, Adapter]], how: str) -> Adapter:
    """A new adapter with s = 1 for the sum of w_i s_i B_i A_i over the pairs (w_i, adapter i).

    "cat"       the factors side by side; exact, and the rank is the sum of the ranks
    "svd"       the best approximation of the sum by a product of the largest rank
    "linear"    A and B are the sums of the A_i and of the B_i, each times sqrt(|w_i s_i|); the sign is in A

    Raises:
        ValueError: "linear", and the ranks differ.
    """
    if how == "cat":
        A, B = np.concatenate([w * a.s * a.A for w, a in pairs]), np.concatenate([a.B for _, a in pairs], 1)
    elif how == "linear":
        if len({a.r for _, a in pairs}) > 1:
            raise ValueError("'linear' needs adapters of one rank")
        A = sum(np.sign(w * a.s) * abs(w * a.s) ** 0.5 * a.A for w, a in pairs)
        B = sum(abs(w * a.s) ** 0.5 * a.B for w, a in pairs)
    else:
        r = max(a.r for _, a in pairs)
        U, S, Vt = np.linalg.svd(sum(w * a.s * (a.B @ a.A) for w, a in pairs), full_matrices=False)
        U, S, Vt = np.pad(U, ((0, 0), (0, r))), np.pad(S, (0, r)), np.pad(Vt, ((0, r), (0, 0)))
        A, B = Vt[:r], U[:, :r] * S[:r]
    A, B = rounded(A, site.fine), rounded(B, site.fine)
    moved = [w * a.moved for w, a in pairs if a.moved is not None]
    return Adapter(A, B, len(A), len(A), 1.0, 1.0, 0.0, True, (A, B), np.sum(moved, 0) if moved else None)


def write_tensors(path: Path, tensors: Mapping[str, Array], dtype: str) -> None:
    """Write a safetensors file: 8 bytes for the length of the header, the header in JSON, the numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for key, value in tensors.items():
        raw = np.ascontiguousarray(value, dtype=NUMPY[dtype]).tobytes()
        header[key] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_tensors(path: Path) -> dict[str, Array]:
    """{key: float64 array} of a safetensors file. ValueError: it is cut off, or has another dtype than `NUMPY`."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 + length:
        raise ValueError(f"{path.name} is cut off")
    found, data = {}, raw[8 + length :]
    for key, about in json.loads(raw[8 : 8 + length]).items():
        if key == "__metadata__":
            continue
        first, last = about["data_offsets"]
        if not 0 <= first <= last <= len(data) or about["dtype"] not in NUMPY:
            raise ValueError(f"{path.name}: {key} is cut off, or of a dtype that is not known")
        values = np.frombuffer(data[first:last], NUMPY[about["dtype"]])
        if about["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        found[key] = values.astype(np.float64).reshape(about["shape"])
    return found


class Plain(Implementation):
    """The reference under the name that `lora-ref check` knows. It claims everything in the contract."""

    name = "plain"
    claims = frozenset(CLAIMS)

    def version(self) -> str:
        return f"numpy {np.__version__}"

    def layer(self, spec: LayerSpec) -> Layer:
        return PlainLayer(spec)

    def model(self, spec: ModelSpec) -> Model:
        return PlainModel(spec)

    def load(self, spec: ModelSpec, folder: Path) -> Model:
        model = PlainModel(spec, empty=True)
        model.load(folder, "default")
        model.set(["default"])
        model.trains = set()  # loaded for inference
        return model

    def load_own(self, spec: ModelSpec, folder: Path) -> Model:
        return self.load(spec, folder)
