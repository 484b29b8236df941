"""Switching one layer's adapter off and on."""

from __future__ import annotations

from .. import oracle
from ..check import Check
from ..contract import Implementation, LayerSpec
from ..generate import inputs, layers
from ..registry import requirement
from .forward import made
from .merging import merged


@requirement("OFF-001", "Switched off, the layer gives what the base gives.", "U2", "disable write", layers)
def off_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.enable(False)
    x = inputs(spec)
    bound = oracle.apply_bound(spec, spec.W, spec.b, x)
    check.close(layer.forward(x), oracle.apply(spec, spec.W, spec.b, x), bound, spec.dtype, "the output")


@requirement("OFF-002", "Switched on again, it gives what it gave before.", "U2", "disable write", layers)
def off_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    x = inputs(spec)
    before = layer.forward(x)
    layer.enable(False)
    layer.enable(True)
    check.equal(layer.forward(x), before, "the output")


@requirement(
    "OFF-003", "Switched off while merged, the layer gives what the base gives.", "U2", "disable write merge", layers
)
def off_003(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merge()
    layer.enable(False)
    x = inputs(spec)
    bound = oracle.apply_bound(spec, merged(spec, state)[1], spec.b, x)  # unmerging may round
    check.close(layer.forward(x), oracle.apply(spec, spec.W, spec.b, x), bound, spec.dtype, "the output")


@requirement("OFF-004", "Switched off and on while merged, the update acts once.", "U2", "disable write merge", layers)
def off_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merge()
    layer.enable(False)
    layer.forward(inputs(spec))
    layer.enable(True)
    x = inputs(spec)
    want, bound = oracle.forward(spec, state, x)
    bound = bound + oracle.apply_bound(spec, merged(spec, state)[1], None, x)
    check.close(layer.forward(x), want, bound, spec.dtype, "the output")


@requirement("OFF-005", "Switching off twice is switching off once, and on likewise.", "U2", "disable write", layers)
def off_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    x = inputs(spec)
    on = layer.forward(x)
    layer.enable(False)
    off = layer.forward(x)
    for enabled, want, times in ((False, off, "off twice"), (True, on, "on"), (True, on, "on twice")):
        layer.enable(enabled)
        check.equal(layer.forward(x), want, f"the output, switched {times}")


@requirement("OFF-006", "Switching off does not change W, A, B or s.", "U2", "disable write", layers)
def off_006(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, before = made(implementation, spec)
    layer.enable(False)
    after = layer.read()
    for name in ("W", "A", "B", "scaling"):
        check.equal(getattr(after, name), getattr(before, name), name)


@requirement(
    "OFF-007",
    "A layer that is off takes no part in training: no gradient to A and B.",
    "U2",
    "disable write grad",
    layers,
)
def off_007(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.enable(False)
    x = inputs(spec)
    if spec.kind == "embedding":
        return  # nothing else has a gradient there
    found = layer.grad(x, oracle.apply(spec, spec.W, spec.b, x))
    for name in "AB":
        check.that(found[name] is None or not found[name].any(), f"{name} has a gradient although the adapter is off")
