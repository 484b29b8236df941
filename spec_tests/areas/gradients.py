"""Gradients: of A, B and x as the formula has them, of W and b none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .. import oracle
from ..check import Check
from ..contract import Array, Implementation, LayerSpec, LayerState
from ..generate import CONVOLUTIONS, LINEAR, MERGEABLE, inputs, integers, layers
from ..registry import requirement
from .forward import made
from .merging import merged

FROZEN = "LoRA, arXiv 2106.09685, section 4: W is frozen, A and B train (D1)"
WITH_X = (*LINEAR, *CONVOLUTIONS, "parameter", "experts")


def of_weight(spec: LayerSpec, x: Array, dy: Array) -> Array:
    """dL/dW of L = sum(dy * apply(W, x)), entry by entry: the layer is linear in W."""
    unit = np.zeros_like(spec.W)
    found = np.empty_like(spec.W)
    for at in np.ndindex(*spec.W.shape):
        unit[at] = 1
        found[at] = (dy * oracle.apply(spec, unit, None, x)).sum()
        unit[at] = 0
    return found


def of_factors(dW: Array, state: LayerState) -> tuple[Array, Array]:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T."""
    A, B, s = state.A, state.B, state.scaling
    if A.ndim == B.ndim == 3:
        return s * B.transpose(0, 2, 1) @ dW, s * dW @ A.transpose(0, 2, 1)
    flat = A.reshape(len(A), -1)
    return (s * B.T @ dW.reshape(len(B), -1)).reshape(A.shape), s * dW.reshape(len(B), -1) @ flat.T


def upstream(spec: LayerSpec, x: Array) -> Array:
    """dL/dy."""
    y = oracle.apply(spec, spec.W, None, x)
    return integers(np.random.default_rng([spec.seed, 9]), y.shape)


def same_factors(
    check: Check, spec: LayerSpec, got: Mapping[str, Array | None], x: Array, dy: Array, state: LayerState
) -> None:
    """dL/dA and dL/dB are as the chain rule has them."""
    want = of_factors(of_weight(spec, x, dy), state)
    sizes = of_factors(
        of_weight(spec, x if spec.kind == "embedding" else abs(x), abs(dy)),
        LayerState(state.W, None, abs(state.A), abs(state.B), abs(state.scaling)),
    )
    for name, value, bound in zip("AB", want, sizes, strict=True):
        check.close(got[name], value, bound, spec.dtype, f"dL/d{name}")


def _factors(id: str, kind: str) -> None:
    @requirement(
        id,
        f"dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, where dL/dW is the base layer's ({kind}).",
        "the chain rule on y = W x + b + s B A x (D1)",
        f"{kind} write grad",
        lambda i: layers(i, (kind,)),
        slow=2,
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        layer, state = made(implementation, spec)
        x = inputs(spec)
        dy = upstream(spec, x)
        same_factors(check, spec, layer.grad(x, dy), x, dy, state)


_factors("GRAD-001", "linear")
_factors("GRAD-002", "transposed")
_factors("GRAD-003", "embedding")
_factors("GRAD-004", "conv1d")
_factors("GRAD-005", "conv2d")
_factors("GRAD-006", "conv3d")
_factors("GRAD-007", "parameter")
_factors("GRAD-008", "experts")


def same_dx(check: Check, spec: LayerSpec, dx: Array | None, dy: Array, W: Array, size: Array, what: str) -> None:
    """dL/dx is that of a plain layer with this weight. `size`: the weight's bound."""
    for salt in range(3):  # dL/dx is the one array whose product with any x' is L(x')
        other = inputs(spec, exact=True, salt=7 + salt)
        want = (dy * oracle.apply(spec, W, None, other)).sum()
        bound = (abs(dy) * oracle.apply(spec, size, None, abs(other))).sum()
        check.close(
            (check.present(dx, "dL/dx") * other).sum(),
            want,
            bound,
            spec.dtype,
            f"the product of {what} with another input",
        )


@requirement(
    "GRAD-009",
    "dL/dx is that of a plain layer with the weight W + s B A.",
    "the chain rule on y = W x + b + s B A x (D1)",
    "write grad",
    lambda i: layers(i, WITH_X),
)
def grad_009(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    dy = upstream(spec, x)
    dx = layer.grad(x, dy)["x"]
    same_dx(check, spec, dx, dy, *merged(spec, state), "dL/dx")


@requirement("GRAD-010", "W and b get no gradient.", FROZEN, "write grad", lambda i: layers(i, MERGEABLE))
def grad_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    x = inputs(spec)
    got = layer.grad(x, upstream(spec, x))
    for name in ("W", "b"):
        check.that(got.get(name) is None, f"{name} has a gradient")


@requirement("GRAD-011", "A and B train, and nothing else.", FROZEN, "trainable", lambda i: layers(i, MERGEABLE))
def grad_011(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    check.equal(sorted(implementation.layer(spec).trainable()), ["A", "B"], "what trains")


@requirement(
    "GRAD-012",
    "At the start the zero factor gets a gradient and the other one gets zeros.",
    "LoRA, arXiv 2106.09685, section 4.1: one factor starts at zero (I1, I2)",
    "grad init:True",
    lambda i: layers(i, MERGEABLE, lora_alpha=8.0),
)
def grad_012(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer = implementation.layer(spec)
    state = layer.read()
    x = inputs(spec)
    dy = upstream(spec, x)
    got = layer.grad(x, dy)
    zero, other = ("A", "B") if not state.A.any() else ("B", "A")
    check.equal(got[other], np.zeros_like(getattr(state, other)), f"dL/d{other} where {zero} = 0")
    if of_weight(spec, x, dy).any():
        check.that(np.asarray(got[zero]).any(), f"dL/d{zero} is 0: training cannot begin")


@requirement(
    "GRAD-013",
    "Only the columns of A of the indices that are in a batch get a gradient.",
    "an embedding's row i is W_i + s B a_i (D4)",
    "embedding write grad",
    lambda i: layers(i, ("embedding",)),
)
def grad_013(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = np.array([[0]])
    got = check.present(layer.grad(x, upstream(spec, x))["A"], "dL/dA")
    check.equal(got[:, 1:], np.zeros_like(state.A[:, 1:]), "dL/dA of the indices that are not there")


@requirement(
    "GRAD-014",
    "A layer whose adapter is switched off gives A and B no gradient.",
    "PEFT's documentation of disable_adapter (U2)",
    "write grad disable",
    lambda i: layers(i, MERGEABLE),
)
def grad_014(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.enable(False)
    x = inputs(spec)
    try:
        got = layer.grad(x, upstream(spec, x))
    except RuntimeError:  # nothing needs a gradient: frameworks may say so, where x cannot have one
        if spec.kind != "embedding":
            raise
        return
    for name in "AB":
        check.that(got[name] is None or not np.any(got[name]), f"{name} has a gradient")


@requirement(
    "GRAD-015",
    "An embedding's A gets no gradient at padding_idx, and the forward still uses its column there.",
    "torch.nn.Embedding's documentation of padding_idx (D4)",
    "embedding padding_idx write grad",
    lambda i: layers(i, ("embedding",), padding_idx=0),
)
def grad_015(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = np.array([[0, spec.W.shape[1] - 1, 0]])
    check.close(layer.forward(x), *oracle.forward(spec, state, x), spec.dtype, "the output at padding_idx")
    got = check.present(layer.grad(x, upstream(spec, x))["A"], "dL/dA")
    check.equal(got[:, 0], np.zeros(len(state.A)), "dL/dA at padding_idx")


@requirement(
    "GRAD-016",
    "The gradients of A and B have the scaling that the layer has now, not the one that it began with.",
    "PEFT's documentation of scale_layer; s multiplies the branch (S4, S5)",
    "write grad rescale",
    lambda i: layers(i, (*LINEAR, *CONVOLUTIONS)),
    slow=2,
)
def grad_016(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.rescale("scale", 4.0)
    x = inputs(spec)
    dy = upstream(spec, x)
    same_factors(check, spec, layer.grad(x, dy), x, dy, state._replace(scaling=4 * spec.scaling))


@requirement(
    "GRAD-017",
    "In a merged layer dL/dx is that of the merged weight: the update counts once.",
    "LoRA, arXiv 2106.09685, section 4.1: the merged layer is a plain one (U1)",
    "write grad merge",
    lambda i: layers(i, WITH_X),
)
def grad_017(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merge()
    x = inputs(spec)
    dy = upstream(spec, x)
    same_dx(check, spec, layer.grad(x, dy)["x"], dy, *merged(spec, state), "dL/dx after merging")


@requirement(
    "GRAD-018",
    "In a layer whose adapter is switched off dL/dx is the base layer's.",
    "PEFT's documentation of disable_adapter (U2)",
    "write grad disable",
    lambda i: layers(i, WITH_X),
)
def grad_018(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.enable(False)
    x = inputs(spec)
    dy = upstream(spec, x)
    same_dx(check, spec, layer.grad(x, dy)["x"], dy, spec.W, abs(spec.W), "dL/dx, switched off,")


@requirement(
    "GRAD-019",
    "The gradients of a dilated convolution are those of the convolution with W + s B A.",
    "D5: A has the base's stride, padding and dilation",
    "write grad",
    lambda i: layers(i, CONVOLUTIONS, dilation=2, stride=1),
    slow=2,
)
def grad_019(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    dy = upstream(spec, x)
    got = layer.grad(x, dy)
    same_factors(check, spec, got, x, dy, state)
    same_dx(check, spec, got["x"], dy, *merged(spec, state), "dL/dx")


@requirement(
    "GRAD-020",
    "In training the gradients of A, B and x are those of the pass with the numbers of x that dropout has left.",
    "PEFT's documentation of lora_dropout (P1): backward has the mask of forward",
    "write dropout grad",
    lambda i: layers(i, (*LINEAR, *CONVOLUTIONS), lora_dropout=0.5),
    slow=2,
)
def grad_020(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    dy = upstream(spec, x)
    got = layer.grad(x, dy, train=True, seed=spec.seed)
    y = layer.forward(x, train=True, seed=spec.seed)
    size = LayerState(state.W, None, 2 * abs(state.A) + 4, 2 * abs(state.B) + 4, state.scaling)  # and 1 / (1 - p)
    bound = (abs(dy) * oracle.forward(spec, size, abs(x) + 4)[1]).sum()
    rng = np.random.default_rng(spec.seed)
    for name, at in (("A", state.A), ("B", state.B), ("x", x)):  # the output is linear in each of them
        step = integers(rng, at.shape)
        layer.write(state.A + step if name == "A" else state.A, state.B + step if name == "B" else state.B)
        moved = layer.forward(x + step if name == "x" else x, train=True, seed=spec.seed)
        value = check.present(got[name], f"dL/d{name}")
        what = f"the change of the loss with {name}, by the gradient"
        check.close((value * step).sum(), (dy * (moved - y)).sum(), bound, spec.dtype, what)
