"""lora_alpha, r and use_rslora."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import Implementation, LayerSpec, ModelSpec
from ..generate import MERGEABLE, inputs, layers, model_inputs, scaled, scales
from ..registry import Unsupported, requirement
from .adapters_named import both, pairs
from .forward import made
from .operations import output, small

RSLORA = "rsLoRA, arXiv 2312.03732, theorem 3.2 (S1)"


@requirement(
    "SCALE-001",
    "s = lora_alpha / r.",
    "LoRA, arXiv 2106.09685, section 4.1 (S1)",
    (),
    lambda i: scaled(i, MERGEABLE, use_rslora=False),
)
def scale_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    s = implementation.layer(spec).read().scaling
    check.close(s, spec.lora_alpha / spec.r, abs(spec.lora_alpha / spec.r), "float64", "s")


@requirement(
    "SCALE-002", "With use_rslora s = lora_alpha / sqrt(r).", RSLORA, "rslora", lambda i: layers(i, use_rslora=True)
)
def scale_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    s = implementation.layer(spec).read().scaling
    check.close(s, spec.lora_alpha / spec.r**0.5, abs(spec.lora_alpha / spec.r**0.5), "float64", "s")


@requirement(
    "SCALE-003",
    "The branch is linear in lora_alpha: twice the alpha gives twice the branch.",
    "S1",
    "write",
    lambda i: scaled(i, MERGEABLE),
)
def scale_003(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    spec = spec.but(lora_alpha=abs(spec.lora_alpha) + 1)
    x = inputs(spec)
    _, state = made(implementation, spec)
    other, _ = made(implementation, spec.but(lora_alpha=2 * spec.lora_alpha))
    want, bound = oracle.forward(spec, state._replace(scaling=2 * spec.scaling), x)
    check.close(other.forward(x), want, bound, spec.dtype, "the output with twice the alpha")


@requirement(
    "SCALE-004", "lora_alpha = 0 switches the update off.", "S3", "write alpha", lambda i: layers(i, lora_alpha=0.0)
)
def scale_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    x = inputs(spec)
    check.close(
        layer.forward(x),
        oracle.apply(spec, spec.W, spec.b, x),
        oracle.apply_bound(spec, spec.W, spec.b, x),
        spec.dtype,
        "the output",
    )


@requirement(
    "SCALE-005",
    "A negative lora_alpha turns the update's sign.",
    "S3",
    "write alpha",
    lambda i: layers(i, lora_alpha=-3.0),
)
def scale_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    want, bound = oracle.forward(spec, state._replace(scaling=spec.scaling), x)
    check.close(layer.forward(x), want, bound, spec.dtype, "the output")


_steps = st.lists(
    st.tuples(st.sampled_from(("set", "scale", "unscale")), st.sampled_from((0.5, 2.0, 4.0))), min_size=1, max_size=4
)


@requirement(
    "SCALE-006",
    "set_scale(f) makes s = f times the initial s, scale_layer(f) multiplies s by f, unscale_layer(f) divides it, and "
    "unscale_layer(None) restores the initial s.",
    "PEFT's documentation of LoraLayer (S4)",
    "rescale",
    lambda i: st.tuples(layers(i), _steps),
)
def scale_006(implementation: Implementation, case: tuple[LayerSpec, list[tuple[str, float]]], check: Check) -> None:
    spec, steps = case
    layer = implementation.layer(spec)
    first = s = layer.read().scaling
    for how, factor in steps:
        layer.rescale(how, factor)
        s = {"set": first * factor, "scale": s * factor, "unscale": s / factor}[how]
        check.close(layer.read().scaling, s, abs(s), "float64", f"s after {how} {factor}")
    layer.rescale("unscale", None)
    check.close(layer.read().scaling, first, abs(first), "float64", "s after unscale_layer(None)")


@requirement(
    "SCALE-007",
    "The scaling acts in the forward and in the merge alike, whatever it was changed to.",
    "S4, S5",
    "rescale write merge",
    lambda i: layers(i, MERGEABLE),
)
def scale_007(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.rescale("scale", 3.0)
    state, x = layer.read(), inputs(spec)
    want, bound = oracle.forward(spec, state, x)
    check.close(layer.forward(x), want, bound, spec.dtype, "the output")
    layer.merge()
    D, size = oracle.delta(state.A, state.B, state.scaling), oracle.delta_bound(state.A, state.B, state.scaling)
    check.close(layer.read().W, spec.W + D, abs(spec.W) + size, spec.dtype, "the merged weight")


@requirement(
    "SCALE-008",
    "Setting s of an adapter makes it the factor times its configured s in every layer, and leaves other adapters.",
    "PEFT's documentation of LoraLayer.set_scale (S4)",
    "model write adapters summed model:rescale",
    lambda i: st.tuples(pairs(i), st.lists(st.sampled_from((-1.0, 0.0, 0.5, 4.0)), min_size=1, max_size=2)),
)
def scale_008(implementation: Implementation, case: tuple[Any, list[float]], check: Check) -> None:
    pair, factors = case
    model, spec, name, first, second = both(implementation, pair)
    model.set(["default", name])
    for factor in factors:
        model.rescale(name, factor)
    now = {module: state._replace(scaling=factors[-1] * state.scaling) for module, state in second.items()}
    x = model_inputs(spec)
    want, size = output(spec, [first, now], x)
    check.close(model.forward(x), want, size, spec.dtype, "the output", 24.0 * len(spec.modules))


def models_with_s(implementation: Implementation) -> Any:
    """Models of what has an s.

    Raises:
        Unsupported: its update is B A, by convention.
    """
    if not scales(implementation):
        raise Unsupported("it has no scaling, by convention")
    return small(implementation)


@requirement(
    "SCALE-009",
    "In a model s of each adapted module is lora_alpha / r.",
    "LoRA, arXiv 2106.09685, section 4.1: the update is scaled by alpha / r (S1)",
    "model",
    models_with_s,
)
def scale_009(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    want = spec.config["lora_alpha"] / spec.config["r"]
    for name, (_, s) in implementation.model(spec).adapted().items():
        check.close(s, want, want, "float64", f"s of {name}")
