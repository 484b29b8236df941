"""A merged copy of a layer: a plain layer with W + s B A, beside an adapted layer that stays as it is."""

from __future__ import annotations

from .. import oracle
from ..check import Check
from ..contract import Implementation, LayerSpec
from ..generate import LINEAR, MERGEABLE, inputs, layers
from ..registry import requirement
from .forward import made
from .merging import merged

FUSE = "LoRA, arXiv 2106.09685, section 4.1: W = W0 + B A can be computed and stored (U1)"


@requirement(
    "COPY-001", "A merged copy has the weight W + s B A.", FUSE, "write merged_copy", lambda i: layers(i, MERGEABLE)
)
def copy_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    check.close(layer.merged_copy()[0], *merged(spec, state), spec.dtype, "the weight of the copy")


@requirement(
    "COPY-002",
    "A merged copy has the bias of the layer.",
    FUSE + ": the update changes the weight alone",
    "linear write merged_copy",
    lambda i: layers(i, LINEAR),
)
def copy_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    spec = spec.but(b=spec.W[:, 0] + 0.5)
    layer, _ = made(implementation, spec)
    check.equal(layer.merged_copy()[1], spec.b, "the bias of the copy")


@requirement(
    "COPY-003",
    "Making a merged copy changes nothing in the layer: W, A, B, s and the output stay.",
    FUSE,
    "write merged_copy",
    lambda i: layers(i, MERGEABLE),
)
def copy_003(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merged_copy()
    after = layer.read()
    for name in ("W", "A", "B", "scaling"):
        check.equal(getattr(after, name), getattr(state, name), name)
    x = inputs(spec)
    want, bound = oracle.forward(spec, state, x)
    check.close(layer.forward(x), want, bound, spec.dtype, "the output after a copy was made")


@requirement(
    "COPY-004",
    "A merged copy has the factors of the time when it was made, a second copy those of its own.",
    FUSE,
    "write merged_copy",
    lambda i: layers(i, MERGEABLE),
)
def copy_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    first = layer.merged_copy()[0]
    layer.write(2 * state.A, state.B)
    second = layer.merged_copy()[0]
    check.close(first, *merged(spec, state), spec.dtype, "the weight of the first copy")
    check.close(second, *merged(spec, state._replace(A=2 * state.A)), spec.dtype, "the weight of the second copy")
