"""Base layers with options of their own: each is followed, merged and unmerged, or refused with an error."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import MESH, Array, Implementation, LayerSpec, LayerState
from ..generate import CONVOLUTIONS, claimed, factors, inputs, layers, reals, seeds
from ..oracle import PADDING
from ..registry import requirement

PAPER = "LoRA, arXiv 2106.09685, section 4.1: h = W x + B A x, and W + B A may be stored in place of W"
CONV = "torch.nn.Conv1d, Conv2d, Conv3d"
EMBEDDING = "torch.nn.Embedding"
SCALED = "transformers, GemmaTextScaledWordEmbedding: the embedding multiplies what it looks up by embed_scale"


def sound(implementation: Implementation, spec: LayerSpec, check: Check) -> Any:
    """The layer with random factors and what it then says of itself; None where the layer is refused."""
    layer = check.tried(lambda: implementation.layer(spec))
    if layer is None:
        return None
    A, B = factors(spec, layer.read())
    layer.write(A, B * in_its_group(spec, B))
    return layer, layer.read()


def in_its_group(spec: LayerSpec, B: Array) -> Array:
    """1 where an output of a convolution belongs to the group of a row of A, else 0."""
    groups = spec.base.get("groups", 1)
    return np.kron(np.eye(groups), np.ones((B.shape[0] // groups, B.shape[1] // groups)))


def expected(spec: LayerSpec, state: LayerState, x: Array) -> tuple[Array, Array]:
    """The output with the weight that the layer was made with, and its bound."""
    return oracle.forward(spec, state._replace(W=spec.W, b=spec.b, scaling=spec.scaling), x)


def merged_keeps(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    """Merging is refused, or the output stays what it was."""
    if (found := sound(implementation, spec, check)) is None:
        return
    layer, state = found
    x = inputs(spec)
    check.tried(layer.merge)
    check.close(layer.forward(x), *expected(spec, state, x), spec.dtype, "the output after merging", factor=16)


@st.composite
def grouped(draw: Any, implementation: Implementation) -> LayerSpec:
    """A convolution in two groups, W (4, 3, *kernel) over six inputs."""
    spec = draw(layers(implementation, CONVOLUTIONS, r=2, b=None, W=np.zeros((1, 1)), use_rslora=False))
    kernel = (2,) * MESH[spec.kind]
    return spec.but(W=reals(np.random.default_rng(draw(seeds)), (4, 3, *kernel)), base={"groups": 2})


@st.composite
def padded(draw: Any, implementation: Implementation) -> LayerSpec:
    """A convolution with another padding mode than zeros."""
    spec = draw(layers(implementation, CONVOLUTIONS))
    return spec.but(padding=draw(st.integers(1, 2)), base={"padding_mode": draw(st.sampled_from(list(PADDING)[1:]))})


@st.composite
def of_any_kernel(draw: Any, implementation: Implementation) -> LayerSpec:
    """A convolution whose kernel has the length 1 along some axes, or along all."""
    spec = draw(layers(implementation, CONVOLUTIONS))
    kernel = draw(st.tuples(*[st.sampled_from((1, 1, 2, 3))] * MESH[spec.kind]))
    return spec.but(W=reals(np.random.default_rng(draw(seeds)), (*spec.W.shape[:2], *kernel)))


@st.composite
def of_several_axes(draw: Any, implementation: Implementation) -> LayerSpec:
    """A convolution with a stride, a padding and a dilation of its own along each axis."""
    spec = draw(layers(implementation, ("conv2d", "conv3d")))
    options = {"stride": (2, 1, 1), "padding": (0, 1, 2), "dilation": (1, 2, 1)}
    turned = draw(st.integers(0, 1))
    base = {name: (v[: MESH[spec.kind]])[:: 1 - 2 * turned] for name, v in options.items()}
    return spec.but(stride=1, padding=0, base=base)


def embeddings(implementation: Implementation, **base: Any) -> Any:
    return layers(implementation, ("embedding",), base=base)


@st.composite
def computed(draw: Any, implementation: Implementation) -> LayerSpec:
    """A layer whose weight is computed from other parameters."""
    kinds = ("linear", "transposed", "embedding", *CONVOLUTIONS)
    return draw(layers(implementation, kinds, base={"parametrized": True}))


@st.composite
def hooked(draw: Any, implementation: Implementation) -> LayerSpec:
    """A layer with a forward hook."""
    kinds = ("linear", "transposed", "embedding", *CONVOLUTIONS)
    return draw(layers(implementation, kinds, base={"hook": draw(st.sampled_from((2.0, -0.5)))}))


@st.composite
def optional(draw: Any, implementation: Implementation) -> LayerSpec:
    """A layer with one of the options, but max_norm, under which the base layer itself changes its weight."""
    kind = draw(st.sampled_from(claimed(implementation, ("linear", "embedding", *CONVOLUTIONS))))
    some: list[dict[str, Any]] = [{"hook": 2.0}, {"parametrized": True}]
    if kind == "embedding":
        some += [{"scale_grad_by_freq": True}, {"sparse": True}, {"embed_scale": 3.0}]
    if MESH.get(kind):
        some += [{"padding_mode": "reflect"}]
    return draw(layers(implementation, (kind,), base=draw(st.sampled_from(some))))


@requirement(
    "LAYEROPT-001",
    "A convolution in groups gives its own output plus s B A x, or is refused.",
    f"{CONV}, groups: each group of outputs sees its group of inputs; {PAPER} (D5)",
    "base_options write",
    grouped,
)
def layeropt_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is not None:
        layer, state = found
        x = inputs(spec)
        check.close(layer.forward(x), *expected(spec, state, x), spec.dtype, "the output")


@requirement(
    "LAYEROPT-002",
    "Merging a convolution in groups keeps the output, or is refused.",
    f"{PAPER} (D5)",
    "base_options write merge",
    grouped,
)
def layeropt_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    merged_keeps(implementation, spec, check)


@requirement(
    "LAYEROPT-003",
    "The branch of a convolution pads as its base does (reflect, circular, replicate), or the layer is refused.",
    f"{CONV}, padding_mode: zeros, reflect, replicate or circular; {PAPER} (D5)",
    "base_options write",
    padded,
)
def layeropt_003(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is not None:
        layer, state = found
        x = inputs(spec)
        check.close(layer.forward(x), *expected(spec, state, x), spec.dtype, "the output")


@requirement(
    "LAYEROPT-004",
    "Merging a convolution keeps the output under every padding mode, or is refused.",
    f"{PAPER} (D5)",
    "base_options write merge",
    padded,
)
def layeropt_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    merged_keeps(implementation, spec, check)


@requirement(
    "LAYEROPT-005",
    "A convolution may have a kernel of length 1 along any axis: the output is that of W + s B A.",
    f"{CONV}, kernel_size: one number or one for each axis; {PAPER} (D5)",
    "write",
    of_any_kernel,
)
def layeropt_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    layer.write(*factors(spec, layer.read()))
    x = inputs(spec)
    check.close(layer.forward(x), *expected(spec, layer.read(), x), spec.dtype, "the output")


@requirement(
    "LAYEROPT-006",
    "Merging a convolution whose kernel has the length 1 along some axis makes the weight W + s B A.",
    f"{PAPER} (D5)",
    "write merge",
    of_any_kernel,
)
def layeropt_006(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    layer.write(*factors(spec, layer.read()))
    state = layer.read()
    layer.merge()
    D, size = (f(state.A, state.B, spec.scaling) for f in (oracle.delta, oracle.delta_bound))
    check.close(layer.read().W, spec.W + D, abs(spec.W) + size, spec.dtype, "the merged weight")


@requirement(
    "LAYEROPT-007",
    "An embedding with max_norm looks up the renormalised row and adds s B A x, or is refused.",
    f"{EMBEDDING}, max_norm: a longer vector is renormalised, and forward writes it into the weight; {PAPER} (D4)",
    "embedding base_options write",
    lambda i: embeddings(i, max_norm=1.0),
)
def layeropt_007(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is not None:
        layer, state = found
        x = inputs(spec)
        check.close(layer.forward(x), *renormalised(spec, state, x), spec.dtype, "the output", factor=16)


def renormalised(spec: LayerSpec, state: LayerState, x: Array) -> tuple[Array, Array]:
    """The output of an embedding whose vectors are no longer than 1, and its bound."""
    W = spec.W / np.maximum(np.linalg.norm(spec.W, axis=0), 1.0)
    return oracle.forward(spec, state._replace(W=W, b=None), x)


@requirement(
    "LAYEROPT-008",
    "With scale_grad_by_freq the gradient of A is divided by the count of each index too, or the layer is refused.",
    f"{EMBEDDING}, scale_grad_by_freq: gradients are scaled by the inverse of the frequency in the batch (D4)",
    "embedding base_options write grad",
    lambda i: embeddings(i, scale_grad_by_freq=True),
)
def layeropt_008(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is None:
        return
    layer, state = found
    x = np.concatenate([inputs(spec).ravel(), [0, 0, 0]])  # some index comes more than once
    got, dA, size = gradients(spec, state, layer, x)
    check.close(got["A"], dA, size, spec.dtype, "dL/dA", factor=64)


@requirement(
    "LAYEROPT-009",
    "A sparse embedding has the same output and the same gradient of A as a dense one, or is refused.",
    f"{EMBEDDING}, sparse: the gradient of the weight is a sparse tensor (D4)",
    "embedding base_options write grad",
    lambda i: embeddings(i, sparse=True),
)
def layeropt_009(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is None:
        return
    layer, state = found
    x = inputs(spec)
    check.close(layer.forward(x), *expected(spec, state, x), spec.dtype, "the output")
    got, dA, size = gradients(spec, state, layer, x)
    check.close(got["A"], dA, size, spec.dtype, "dL/dA", factor=64)


@requirement(
    "LAYEROPT-010",
    "An embedding with embed_scale multiplies the branch by it as well, or is refused.",
    f"{SCALED}; {PAPER} (D4)",
    "embedding base_options write",
    lambda i: embeddings(i, embed_scale=3.0),
)
def layeropt_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is not None:
        layer, state = found
        x = inputs(spec)
        check.close(layer.forward(x), *expected(spec, state, x), spec.dtype, "the output")


@requirement(
    "LAYEROPT-011",
    "Merging an embedding with embed_scale keeps the output, or is refused.",
    f"{SCALED}; {PAPER} (D4)",
    "embedding base_options write merge",
    lambda i: embeddings(i, embed_scale=3.0),
)
def layeropt_011(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    merged_keeps(implementation, spec, check)


@requirement(
    "LAYEROPT-012",
    "The gradient of A of an embedding has the factor embed_scale, or the layer is refused.",
    f"{SCALED}; the chain rule (D4)",
    "embedding base_options write grad",
    lambda i: embeddings(i, embed_scale=3.0),
)
def layeropt_012(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is not None:
        layer, state = found
        got, dA, size = gradients(spec, state, layer, inputs(spec))
        check.close(got["A"], dA, size, spec.dtype, "dL/dA", factor=64)


@requirement(
    "LAYEROPT-013",
    "A layer whose weight is computed from other parameters gives W x + b + s B A x, or is refused.",
    f"torch.nn.utils.parametrize: the weight is computed anew at each access; {PAPER}",
    "base_options write",
    computed,
)
def layeropt_013(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is not None:
        layer, state = found
        x = inputs(spec)
        check.close(layer.forward(x), *expected(spec, state, x), spec.dtype, "the output")


@requirement(
    "LAYEROPT-014",
    "A forward hook of the base layer changes the output of the base layer once, and not the branch.",
    f"torch.nn.Module.register_forward_hook: the hook may replace the output of its module; {PAPER}",
    "base_options write",
    hooked,
)
def layeropt_014(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is None:
        return
    layer, state = found
    x, factor = inputs(spec), spec.base["hook"]
    base, size = oracle.apply(spec, spec.W, spec.b, x), oracle.apply_bound(spec, spec.W, spec.b, x)
    want, bound = factor * base + oracle.branch(spec, state, x), 2 * size + oracle.branch_bound(spec, state, x)
    check.close(layer.forward(x), want, bound, spec.dtype, "the output")


@requirement(
    "LAYEROPT-015",
    "Under each option a forward changes no weight, in training and in evaluation, or the layer is refused.",
    f"{PAPER}: W is frozen and does not change",
    "base_options write",
    optional,
)
def layeropt_015(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is None:
        return
    layer, state = found
    x = inputs(spec)
    y = layer.forward(x)
    layer.forward(x, train=True)
    check.equal(layer.read().W, state.W, "the weight after two forwards")
    check.equal(layer.forward(x), y, "the output of the third forward")


@requirement(
    "LAYEROPT-016",
    "Merging an embedding with max_norm keeps the output, or one of the two is refused.",
    f"{EMBEDDING}, max_norm: a longer vector is renormalised, and forward writes it into the weight; {PAPER} (D4)",
    "embedding base_options write merge",
    lambda i: embeddings(i, max_norm=1.0),
)
def layeropt_016(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is not None:
        layer, state = found
        x = inputs(spec)
        if check.tried(lambda: layer.merge() or True):
            want, bound = renormalised(spec, state, x)
            check.close(layer.forward(x), want, bound, spec.dtype, "the output after merging", factor=16)


@requirement(
    "LAYEROPT-017",
    "Merging into a weight that is computed from other parameters keeps the output, or is refused.",
    f"torch.nn.utils.parametrize: the weight is computed anew at each access; {PAPER}",
    "base_options write merge",
    computed,
)
def layeropt_017(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    merged_keeps(implementation, spec, check)


@requirement(
    "LAYEROPT-018",
    "The branch of a convolution has the base's stride, padding and dilation along each axis, or is refused.",
    f"{CONV}, stride, padding, dilation: a number, or a tuple of one for each axis; {PAPER} (D5)",
    "base_options write",
    of_several_axes,
)
def layeropt_018(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if (found := sound(implementation, spec, check)) is not None:
        layer, state = found
        x = inputs(spec)
        check.close(layer.forward(x), *expected(spec, state, x), spec.dtype, "the output")


def gradients(spec: LayerSpec, state: LayerState, layer: Any, x: Array) -> tuple[dict[str, Array | None], Array, Array]:
    """What the layer gives, the gradient of A of an embedding, and its bound."""
    dy = reals(np.random.default_rng([spec.seed, 7]), (*x.shape, len(spec.W)))
    scale, counts = spec.base.get("embed_scale", 1.0), np.bincount(x.ravel())[x]
    each = spec.scaling * scale * (dy @ state.B) / (counts[..., None] if spec.base.get("scale_grad_by_freq") else 1)
    dA, size = np.zeros_like(state.A), np.zeros_like(state.A)
    np.add.at(dA.T, x, each)
    np.add.at(size.T, x, abs(spec.scaling * scale) * (abs(dy) @ abs(state.B)))
    return layer.grad(x, dy), dA, size
