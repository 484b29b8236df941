"""Which shapes the factors have, and which inputs a layer takes."""

from __future__ import annotations

import numpy as np

from .. import oracle
from ..check import UNIT, Check
from ..contract import MESH, Implementation, LayerSpec
from ..generate import CONVOLUTIONS, LINEAR, MERGEABLE, inputs, layers
from ..registry import requirement
from .forward import made


def _shapes(id: str, kind: str, source: str, sentence: str) -> None:
    @requirement(id, f"{kind}: {sentence}.", source, kind, lambda i: layers(i, (kind,)))
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        state = implementation.layer(spec).read()
        experts = spec.W.shape[:-2] if kind == "experts" else ()
        kernel = spec.W.shape[2:] if MESH.get(kind) else ()
        out, n_in = spec.W.shape[len(experts) : len(experts) + 2]
        for name, want in (("A", (*experts, spec.r, n_in, *kernel)), ("B", (*experts, out, spec.r))):
            check.equal(getattr(state, name).shape, want, f"the shape of {name}")


_shapes("SHAPE-001", "linear", "LoRA, arXiv 2106.09685, section 4.1 (D2)", "A is (r, in), B is (out, r)")
_shapes(
    "SHAPE-002",
    "transposed",
    "PEFT's documentation of fan_in_fan_out (D3)",
    "A is (r, in), B is (out, r), as of a linear layer",
)
_shapes("SHAPE-003", "embedding", "loralib's Embedding (D4)", "A is (r, rows), B is (dimension, r)")
_shapes("SHAPE-004", "conv1d", "PEFT's convolutions (D5)", "A is (r, in, kernel), B is (out, r)")
_shapes("SHAPE-005", "conv2d", "PEFT's convolutions (D5)", "A is (r, in, *kernel), B is (out, r)")
_shapes("SHAPE-006", "conv3d", "PEFT's convolutions (D5)", "A is (r, in, *kernel), B is (out, r)")
_shapes("SHAPE-007", "parameter", "PEFT's documentation of target_parameters (D7)", "A is (r, in), B is (out, r)")
_shapes(
    "SHAPE-008",
    "experts",
    "PEFT's documentation of target_parameters (D7)",
    "each expert has A (r, in) and B (out, r)",
)


@requirement(
    "SHAPE-009",
    "r may exceed both in and out.",
    "PEFT's documentation gives r no upper bound (D8)",
    "large_r write",
    lambda i: layers(
        i, ("linear", "transposed"), r=9, lora_alpha=2.0, W=np.array([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]]), b=None
    ),
)
def shape_009(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    check.equal((state.A.shape, state.B.shape), ((9, 3), (2, 9)), "the shapes of A and B")
    x = np.array([[1.0, 2.0, -1.0]])
    D = spec.scaling * state.B @ state.A
    bound = abs(x) @ (abs(spec.W) + spec.scaling * abs(state.B) @ abs(state.A)).T
    check.close(layer.forward(x), x @ (spec.W + D).T, bound, spec.dtype, "the output")


@requirement(
    "SHAPE-010",
    "The factors of a half precision weight are kept in float32.",
    "PEFT's documentation of autocast_adapter_dtype (T1)",
    "write float32_factors",
    lambda i: layers(i, LINEAR, ("float16", "bfloat16")),
)
def shape_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    fine = 2.0**-20  # far below the spacing of float16 and of bfloat16
    layer.write(np.full_like(state.A, 1 + fine), np.full_like(state.B, 1 - fine))
    kept = layer.read()
    for got, value, what in ((kept.A, 1 + fine, "A after 1 + 2**-20"), (kept.B, 1 - fine, "B after 1 - 2**-20")):
        check.equal(got, np.full_like(got, value), f"{what} was written")


@requirement(
    "SHAPE-011",
    "Factors that are set are the factors that are used: read gives them back.",
    "A and B are ordinary parameters (D2)",
    "write",
    lambda i: layers(i, MERGEABLE),
)
def shape_011(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    before = layer.read()
    rng = np.random.default_rng(spec.seed)
    A, B = (rng.integers(-8, 9, like.shape) / 4 for like in (before.A, before.B))
    layer.write(A, B)
    after = layer.read()
    for name, want in (("A", A), ("B", B)):
        check.equal(getattr(after, name), want, f"{name} as read after it was written")
    check.equal(after.W, spec.W, "W after A and B were written")


@requirement(
    "SHAPE-012",
    "A batch without tokens gives an output without tokens.",
    "y = W x + b for each token (D1)",
    "linear",
    lambda i: layers(i, LINEAR),
)
def shape_012(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    check.equal(layer.forward(np.zeros((0, spec.W.shape[1]))).shape, (0, len(spec.W)), "the shape for no tokens")


@requirement(
    "SHAPE-013",
    "The output is a number of the base weight's dtype: nothing finer.",
    "T2: the sum is cast back to the dtype of the base's output",
    "write",
    lambda i: layers(i, LINEAR, ("float16", "bfloat16")),
)
def shape_013(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _state = made(implementation, spec)
    y = layer.forward(inputs(spec))
    mantissa = np.frexp(y)[0] / UNIT[spec.dtype]  # an integer, if y has no more bits than the dtype
    check.equal(mantissa, np.round(mantissa), f"the output's bits beyond {spec.dtype}'s")


@requirement(
    "SHAPE-014",
    "The branch of a half precision layer is computed in float32: it is rounded where it joins the output, not before.",
    "lora_ref's decision (T2): x is cast to the factors' dtype, and the sum back to the output's",
    "write float32_factors float32_branch",
    lambda i: layers(i, (*LINEAR, *CONVOLUTIONS, "embedding"), ("float16", "bfloat16")),
)
def shape_014(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    spec = spec.but(W=np.zeros_like(spec.W), b=None)  # then the base's output is 0 and what is seen is the branch
    layer, state = made(implementation, spec)
    x = inputs(spec)
    want, bound = oracle.forward(spec, state, x)
    # one rounding of the result to the dtype, and 16 of float32 before it; below 2**-14 float16 is subnormal
    unit = abs(want) + bound * 16 * UNIT["float32"] / UNIT[spec.dtype] + 2.0**-14
    check.close(layer.forward(x), want, unit, spec.dtype, "the output where W = 0", factor=1.01)


@requirement(
    "SHAPE-015",
    "The factors of a float64 weight are kept in float64.",
    "T1: only factors of less than float32 are cast",
    "write float64",
    lambda i: layers(i, LINEAR, ("float64",)),
)
def shape_015(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    fine = 2.0**-40  # far below the spacing of float32
    layer.write(np.full_like(state.A, 1 + fine), np.full_like(state.B, 1 - fine))
    kept = layer.read()
    for got, value, what in ((kept.A, 1 + fine, "A after 1 + 2**-40"), (kept.B, 1 - fine, "B after 1 - 2**-40")):
        check.equal(got, np.full_like(got, value), f"{what} was written")


@requirement(
    "SHAPE-016",
    "An embedding takes indices of any shape, a single index too, and gives each its row.",
    "an embedding's row i is W_i + s B a_i, for each index (D4)",
    "embedding write unbatched",
    lambda i: layers(i, ("embedding",)),
)
def shape_016(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    for shape in ((), (3,), (2, 1, 3)):
        x = np.asarray(inputs(spec, tokens=shape))
        want, bound = oracle.forward(spec, state, x)
        check.close(layer.forward(x), want, bound, spec.dtype, f"the output for indices of the shape {shape}")


@requirement(
    "SHAPE-017",
    "An empty batch gives an empty output, of a convolution and of an embedding too.",
    "y = W x + b for each sample (D1)",
    (),
    lambda i: layers(i, (*CONVOLUTIONS, "embedding")),
)
def shape_017(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    x = inputs(spec)
    want = oracle.apply(spec, spec.W, None, x).shape
    got = implementation.layer(spec).forward(x[:0])
    check.equal(got.shape, (0, *want[1:]), "the shape for an empty batch")
