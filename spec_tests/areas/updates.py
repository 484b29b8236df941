"""Convolutions, judged by their update D alone: how it is made of factors differs from library to library."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import MESH, Implementation, Layer, LayerSpec
from ..generate import ALPHAS, CONVOLUTIONS, inputs, reals, seeds
from ..registry import Unsupported, requirement

SUM = "LoRA, arXiv 2106.09685, section 4.1: the adapted layer is that of the weight W + D (D1, D5)"
START = "LoRA, arXiv 2106.09685, section 4.1: D is zero at the beginning of training (I1)"
MERGED = "LoRA, arXiv 2106.09685, section 4.1: W + D is computed explicitly, and W is recovered by subtracting D (U1)"
OFF = "PEFT's documentation of disable_adapter: the base model's output (U2)"


@st.composite
def convolutions(draw: Any, implementation: Implementation) -> LayerSpec:
    """A convolution with a kernel as long in each direction: 2 or 3; other kernels are drawn with `base_options`."""
    kinds = [kind for kind in CONVOLUTIONS if f"update:{kind}" in implementation.claims]
    if not kinds:
        raise Unsupported("claims no convolution with an update")
    kind = draw(st.sampled_from(kinds))
    rng = np.random.default_rng(draw(seeds))
    out, n_in = draw(st.sampled_from(((2, 2), (4, 3), (3, 4))))
    kernel = [draw(st.sampled_from((2, 3)))] * MESH[kind]
    return LayerSpec(
        kind,
        reals(rng, (out, n_in, *kernel)),
        reals(rng, (out,)) if draw(st.booleans()) else None,
        r=draw(st.sampled_from((1, 2))),
        lora_alpha=draw(st.sampled_from(ALPHAS)),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        seed=draw(seeds),
    )


def made(implementation: Implementation, spec: LayerSpec) -> tuple[Layer, Any]:
    """The layer with an update that is not zero, and that update."""
    layer = implementation.layer(spec)
    layer.scatter(spec.seed)
    return layer, layer.update()


def gives(check: Check, layer: Layer, spec: LayerSpec, D: Any, what: str) -> None:
    """The output is that of W + D. A sum of r products stands behind each number of D, and is as large as r s."""
    x, size = inputs(spec), abs(D) + spec.r * spec.scaling * 16.0
    want = oracle.apply(spec, spec.W + D, spec.b, x)
    bound = oracle.apply_bound(spec, abs(spec.W) + size, spec.b, x)
    check.close(layer.forward(x), want, bound, spec.dtype, what)


@requirement(
    "UPDATE-001",
    "A convolution's update has the shape of its weight, and is zero at the start.",
    START,
    "update init:True",
    convolutions,
)
def update_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    check.equal(implementation.layer(spec).update(), 0 * spec.W, "D at the start")


@requirement(
    "UPDATE-002",
    "The output of an adapted convolution is that of the convolution with W + D.",
    SUM,
    "update",
    convolutions,
)
def update_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, D = made(implementation, spec)
    check.that((D != 0).any(), "the update of random factors is zero")
    gives(check, layer, spec, D, "the output")


@requirement(
    "UPDATE-003",
    "Merging a convolution adds D to its weight.",
    MERGED,
    "update merge",
    convolutions,
)
def update_003(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, D = made(implementation, spec)
    layer.merge()
    check.close(layer.base_weight(), spec.W + D, abs(spec.W) + abs(D), spec.dtype, "the merged weight")


@requirement(
    "UPDATE-004",
    "A merged convolution gives the output of before.",
    MERGED,
    "update merge",
    convolutions,
)
def update_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, D = made(implementation, spec)
    layer.merge()
    gives(check, layer, spec, D, "the output of the merged convolution")


@requirement(
    "UPDATE-005",
    "Unmerging a convolution takes D out of its weight again.",
    MERGED,
    "update merge unmerge",
    convolutions,
)
def update_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, D = made(implementation, spec)
    layer.merge()
    layer.unmerge()
    check.close(layer.base_weight(), spec.W, abs(spec.W) + 2 * abs(D), spec.dtype, "the weight after unmerging")
    gives(check, layer, spec, D, "the output after unmerging")


@requirement(
    "UPDATE-006",
    "A convolution that is switched off gives the output of its base.",
    OFF,
    "update disable",
    convolutions,
)
def update_006(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.enable(False)
    gives(check, layer, spec, 0 * spec.W, "the output while the adapter is off")
