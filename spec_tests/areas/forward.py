"""What an adapted layer computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import generate, oracle
from ..check import Check
from ..contract import Implementation, LayerSpec
from ..generate import MERGEABLE, factors, inputs, layers
from ..registry import requirement

PAPER = "LoRA, arXiv 2106.09685, section 4.1 (D1)"


def made(implementation: Implementation, spec: LayerSpec, exact: bool = False) -> Any:
    """The layer with random factors, and what it then says of itself."""
    layer = implementation.layer(spec)
    layer.write(*factors(spec, layer.read(), exact))
    return layer, layer.read()


def _forward(id: str, kind: str, sentence: str, source: str = PAPER) -> None:
    @requirement(id, sentence, source, f"{kind} write", lambda i: layers(i, (kind,), ("float32", "float64")))
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        layer, state = made(implementation, spec)
        x = inputs(spec)
        want, bound = oracle.forward(spec, state._replace(scaling=spec.scaling), x)
        check.close(layer.forward(x), want, bound, spec.dtype, "the output")


_forward("FORWARD-001", "linear", "A linear layer gives W x + b + s B A x.")
_forward("FORWARD-002", "transposed", "A layer that stores W as (in, out) gives W x + b + s B A x.", "D3, F1")
_forward("FORWARD-003", "embedding", "An embedding gives row i of the table plus s B a_i, a_i the column i of A.", "D4")
_forward("FORWARD-004", "conv1d", "A convolution in 1 dimension gives the convolution with W + s B A.", "D5")
_forward("FORWARD-005", "conv2d", "A convolution in 2 dimensions gives the convolution with W + s B A.", "D5")
_forward("FORWARD-006", "conv3d", "A convolution in 3 dimensions gives the convolution with W + s B A.", "D5")
_forward("FORWARD-007", "parameter", "A raw parameter acts as W + s B A.", "D7")
_forward("FORWARD-008", "experts", "Each expert of a stack acts as W_e + s B_e A_e.", "D7")


def _dilated(id: str, kind: str) -> None:
    @requirement(
        id,
        f"The branch of a {kind} has the base's dilation.",
        "D5: A has the base's stride, padding and dilation",
        f"{kind} write",
        lambda i: layers(i, (kind,), dilation=2, stride=1),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        layer, state = made(implementation, spec)
        x = inputs(spec)
        want, bound = oracle.forward(spec, state._replace(scaling=spec.scaling), x)
        check.close(layer.forward(x), want, bound, spec.dtype, "the output")


_dilated("FORWARD-020", "conv1d")
_dilated("FORWARD-021", "conv2d")
_dilated("FORWARD-022", "conv3d")


@requirement(
    "FORWARD-010",
    "With integers and a scaling that is a power of two the output is exact, in every dtype.",
    PAPER,
    "write",
    lambda i: layers(i, MERGEABLE, generate.DTYPES, exact=True),
)
def forward_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec, exact=True)
    x = inputs(spec, exact=True)
    want, bound = oracle.forward(spec, state._replace(scaling=spec.scaling), x)
    largest = {"float16": 2**11, "bfloat16": 2**8}.get(spec.dtype, 2**24)
    if bound.max() * 2 < largest:  # halves count too
        check.equal(layer.forward(x), want, "the output")
    else:
        check.close(layer.forward(x), want, bound, spec.dtype, "the output")


@requirement(
    "FORWARD-011",
    "Tokens do not mix: each row of a batch gives what it gives alone.",
    "D1",
    "write",
    lambda i: layers(i, (*generate.LINEAR, "embedding", "parameter")),
)
def forward_011(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    together = layer.forward(x)
    _, bound = oracle.forward(spec, state, x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            check.close(
                layer.forward(x[i : i + 1, j : j + 1])[0, 0], together[i, j], bound[i, j], spec.dtype, "a row alone"
            )


@requirement(
    "FORWARD-012",
    "The base weight stays bit for bit as it is: making, setting and running an adapter does not touch it.",
    PAPER,
    "write",
    lambda i: layers(i, MERGEABLE, generate.DTYPES),
)
def forward_012(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.forward(inputs(spec))
    state = layer.read()
    check.equal(state.W, spec.W, "the base weight")
    if spec.b is not None:
        check.equal(state.b, spec.b, "the base bias")


@requirement(
    "FORWARD-013",
    "Inputs of one dimension and of three give the same as in two.",
    "D1",
    "linear write unbatched",
    lambda i: layers(i, generate.LINEAR),
)
def forward_013(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec, tokens=(4,))
    y, bound = layer.forward(x), oracle.forward(spec, state, x)[1]
    check.close(layer.forward(x[0]), y[0], bound[0], spec.dtype, "a vector")
    check.close(layer.forward(x.reshape(2, 2, 1, -1)).reshape(y.shape), y, bound, spec.dtype, "four dimensions")


@requirement(
    "FORWARD-014",
    "In half precision the output is the base's plus the branch's, rounded no more than once more.",
    "T2",
    "write",
    lambda i: layers(i, MERGEABLE, ("float16", "bfloat16")),
)
def forward_014(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    want, bound = oracle.forward(spec, state, x)
    if np.isfinite(want).all() and bound.max() < 6e4:
        check.close(layer.forward(x), want, bound, spec.dtype, "the output")
