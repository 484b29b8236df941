"""Fused layers: one weight for q, k and v, of which some parts are adapted, each by factors of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import Array, Implementation, Layer, LayerSpec, LayerState
from ..generate import ALPHAS, LINEAR, claimed, inputs, reals, scales, seeds
from ..registry import requirement

PARTS = "loralib's README: MergedLinear with enable_lora=[True, False, True] adapts q and v of one fused projection"
MERGED = "LoRA, arXiv 2106.09685, section 4.1: the merged weight is W + B A, and subtracting B A recovers W (U1)"
START = "LoRA, arXiv 2106.09685, section 4.1: B is zero at the start (I1)"
SCALE = "LoRA, arXiv 2106.09685, section 4.1: the update is scaled by alpha / r (S1)"
MASKS = (
    (True, False, True),
    (False, True, False),
    (True, True, True),
    (False, False, True),
    (True, True, False),
    (False, True),
)


@st.composite
def fused(draw: Any, implementation: Implementation) -> LayerSpec:
    """A fused layer of two or three parts with two outputs each."""
    parts = draw(st.sampled_from(MASKS))
    rng = np.random.default_rng(draw(seeds))
    out, r = 2 * len(parts), draw(st.sampled_from((1, 2)))
    return LayerSpec(
        draw(st.sampled_from(claimed(implementation, LINEAR))),
        reals(rng, (out, 4)),
        reals(rng, (out,)) if draw(st.booleans()) else None,
        r=r,
        lora_alpha=draw(st.sampled_from(ALPHAS)) if scales(implementation) else float(r),
        seed=draw(seeds),
        parts=parts,
    )


def adapted(spec: LayerSpec) -> list[tuple[slice, slice]]:
    """Of each adapted part: its outputs, and its rows of A."""
    size, r = len(spec.W) // len(spec.parts), spec.r
    numbers = [part for part, here in enumerate(spec.parts) if here]
    return [(slice(part * size, (part + 1) * size), slice(i * r, (i + 1) * r)) for i, part in enumerate(numbers)]


def fill(layer: Layer, spec: LayerSpec) -> LayerState:
    """Random factors for every adapted part; the state as the suite wants it, not as the layer reads it."""
    rng = np.random.default_rng([spec.seed, 17])
    A = reals(rng, (spec.r * sum(spec.parts), spec.n_in))
    B = np.zeros((len(spec.W), len(A)))
    for outputs, rows in adapted(spec):
        B[outputs, rows] = reals(rng, B[outputs, rows].shape)
    layer.write(A, B)
    return LayerState(spec.W, spec.b, A, B, spec.lora_alpha / spec.r)


def gives(check: Check, layer: Layer, spec: LayerSpec, state: LayerState, what: str) -> None:
    want, bound = oracle.forward(spec, state, inputs(spec))
    check.close(layer.forward(inputs(spec)), want, bound, spec.dtype, what, factor=16.0)


def slopes(spec: LayerSpec) -> Array:
    return reals(np.random.default_rng([spec.seed, 19]), (2, 3, len(spec.W)))


@requirement(
    "FUSED-001",
    "Each adapted part of a fused layer adds the update of its own A and B, and the other parts add nothing.",
    f"{PARTS}; {SCALE}",
    "fused write",
    fused,
)
def fused_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    gives(check, layer, spec, fill(layer, spec), "the output")


@requirement(
    "FUSED-002",
    "A fused layer has r rows of A and r columns of B for each adapted part.",
    PARTS,
    "fused",
    fused,
)
def fused_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    state = implementation.layer(spec).read()
    check.equal(state.A.shape, (spec.r * sum(spec.parts), spec.n_in), "the shape of A")
    check.equal(state.B.shape, (len(spec.W), spec.r * sum(spec.parts)), "the shape of B")


@requirement(
    "FUSED-003",
    "What is written into the factors of a fused layer is read again.",
    PARTS,
    "fused write",
    fused,
)
def fused_003(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    state = fill(layer, spec)
    check.equal(layer.read().A, state.A, "A")
    check.equal(layer.read().B, state.B, "B")


@requirement(
    "FUSED-004",
    "A fresh fused layer gives the output of its base, and A is not zero.",
    START,
    "fused init:True",
    fused,
)
def fused_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    y, bound = oracle.apply(spec, spec.W, spec.b, inputs(spec)), oracle.apply_bound(spec, spec.W, spec.b, inputs(spec))
    check.close(layer.forward(inputs(spec)), y, bound, spec.dtype, "the output")
    check.that((layer.read().A != 0).all(), "A has zeros at the start")


@requirement(
    "FUSED-005",
    "Merging adds the update to the adapted parts of the weight, and leaves the others bit for bit.",
    f"{PARTS}; {MERGED}",
    "fused write merge",
    fused,
)
def fused_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    state = fill(layer, spec)
    layer.merge()
    W = layer.read().W
    want = spec.W + oracle.delta(state.A, state.B, state.scaling)
    bound = abs(spec.W) + oracle.delta_bound(state.A, state.B, state.scaling)
    check.close(W, want, bound, spec.dtype, "the merged weight")
    outside = (state.B == 0).all(1)
    check.equal(W[outside], spec.W[outside], "the weight of the parts that are not adapted")


@requirement(
    "FUSED-006",
    "A merged fused layer gives the output of before.",
    MERGED,
    "fused write merge",
    fused,
)
def fused_006(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    state = fill(layer, spec)
    layer.merge()
    gives(check, layer, spec, state, "the output of the merged layer")


@requirement(
    "FUSED-007",
    "Unmerging a fused layer takes the update out of the weight again.",
    MERGED,
    "fused write merge unmerge",
    fused,
)
def fused_007(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    state = fill(layer, spec)
    layer.merge()
    layer.unmerge()
    bound = abs(spec.W) + 2 * oracle.delta_bound(state.A, state.B, state.scaling)
    check.close(layer.read().W, spec.W, bound, spec.dtype, "the weight after unmerging")


@requirement(
    "FUSED-008",
    "Each part's A and B have the gradients of that part alone.",
    f"{PARTS}; the chain rule (B1)",
    "fused write grad",
    fused,
)
def fused_008(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    state, dy = fill(layer, spec), slopes(spec)
    got = layer.grad(inputs(spec), dy)
    dW, bound = (np.einsum("bto,bti->oi", f(dy), f(inputs(spec))) for f in (np.asarray, abs))
    s = state.scaling
    check.close(got["A"], s * state.B.T @ dW, abs(s) * abs(state.B).T @ bound, spec.dtype, "the gradient of A", 16.0)
    own = state.B != 0
    check.close(got["B"], own * (s * dW @ state.A.T), bound @ abs(s * state.A).T, spec.dtype, "the gradient of B", 16.0)


@requirement(
    "FUSED-009",
    "The gradient of a fused layer's input goes through W and through every adapted part.",
    f"{PARTS}; the chain rule (B1)",
    "fused write grad",
    fused,
)
def fused_009(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    state, dy = fill(layer, spec), slopes(spec)
    got = layer.grad(inputs(spec), dy)
    W = spec.W + oracle.delta(state.A, state.B, state.scaling)
    bound = abs(dy) @ (abs(spec.W) + oracle.delta_bound(state.A, state.B, state.scaling))
    check.close(got["x"], dy @ W, bound, spec.dtype, "the gradient of the input", 16.0)
