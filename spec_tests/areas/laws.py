"""Laws between operations and between kinds of layers: they find what a test of one operation misses."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import Implementation, LayerSpec, ModelSpec
from ..generate import LINEAR, MERGEABLE, inputs, layers, model_inputs, scaled
from ..registry import requirement
from .forward import made
from .operations import fill, gives, holds, output, small

SAME = "the same matrix W + s B A (D1)"


@requirement(
    "LAW-001",
    "Twice the lora_alpha, or set_scale(2): the same output.",
    "two ways to the same s (S1, S4)",
    "write rescale",
    lambda i: layers(i, LINEAR, lora_alpha=2.0),
)
def law_001(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, state = made(implementation, spec)
    one.rescale("set", 2.0)
    two = implementation.layer(spec.but(lora_alpha=2 * spec.lora_alpha))
    two.write(state.A, state.B)
    x = inputs(spec)
    bound = oracle.forward(spec, state._replace(scaling=2 * state.scaling), x)[1]
    check.close(one.forward(x), two.forward(x), bound, spec.dtype, "the output after set_scale(2)", 16)


@requirement(
    "LAW-002",
    "use_rslora with lora_alpha, or none with sqrt(r) times as much: the same output.",
    "two ways to the same s (S1)",
    "write rslora alpha",
    lambda i: layers(i, LINEAR, r=4, use_rslora=True),
)
def law_002(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, state = made(implementation, spec)
    two = implementation.layer(spec.but(use_rslora=False, lora_alpha=2 * spec.lora_alpha))
    two.write(state.A, state.B)
    x = inputs(spec)
    check.close(two.forward(x), one.forward(x), oracle.forward(spec, state, x)[1], spec.dtype, "the output", 16)


@requirement(
    "LAW-003", "B / 2 with twice the lora_alpha: the same output.", SAME, "write", lambda i: scaled(i, MERGEABLE)
)
def law_003(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, state = made(implementation, spec)
    two = implementation.layer(spec.but(lora_alpha=2 * spec.lora_alpha))
    two.write(state.A, state.B / 2)
    x = inputs(spec)
    check.close(two.forward(x), one.forward(x), oracle.forward(spec, state, x)[1], spec.dtype, "the output", 16)


@requirement(
    "LAW-004",
    "A transposed layer is a linear one with the same W.",
    "F3",
    "linear transposed write",
    lambda i: layers(i, ("linear",)),
)
def law_004(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, state = made(implementation, spec)
    two = implementation.layer(spec.but(kind="transposed"))
    two.write(state.A, state.B)
    x = inputs(spec)
    check.close(two.forward(x), one.forward(x), oracle.forward(spec, state, x)[1], spec.dtype, "the output", 16)
    check.equal(two.read().W, one.read().W, "the logical weight")


@requirement(
    "LAW-005",
    "An embedding is a linear layer of one-hot vectors.",
    "D4",
    "linear embedding write",
    lambda i: layers(i, ("embedding",)),
)
def law_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, state = made(implementation, spec)
    two = implementation.layer(spec.but(kind="linear"))
    two.write(state.A, state.B)
    x = np.arange(spec.W.shape[1])
    bound = oracle.forward(spec, state, x)[1]
    check.close(one.forward(x), two.forward(np.eye(len(x))), bound, spec.dtype, "the rows of the table", 16)


@requirement(
    "LAW-006",
    "A convolution with a kernel of size 1 is a linear layer at each place.",
    "D5",
    "linear conv2d write",
    lambda i: layers(i, ("linear",), b=None),
)
def law_006(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, state = made(implementation, spec)
    two = implementation.layer(spec.but(kind="conv2d", W=spec.W[:, :, None, None]))
    two.write(state.A[:, :, None, None], state.B)
    x = inputs(spec)  # (2, 3, in)
    bound = oracle.forward(spec, state, x)[1]
    got = two.forward(x.transpose(0, 2, 1)[..., None])[..., 0].transpose(0, 2, 1)
    check.close(got, one.forward(x), bound, spec.dtype, "the output", 16)


@requirement(
    "LAW-007",
    "One expert of a stack is a raw parameter.",
    "D7",
    "parameter experts write",
    lambda i: layers(i, ("experts",)),
)
def law_007(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    stack, state = made(implementation, spec)
    x = inputs(spec)
    y = stack.forward(x)
    bound = oracle.forward(spec, state, x)[1]
    for e in range(len(spec.W)):
        alone = implementation.layer(spec.but(kind="parameter", W=spec.W[e]))
        alone.write(state.A[e], state.B[e])
        check.close(alone.forward(x[e]), y[e], bound[e], spec.dtype, f"the output of expert {e}", 16)


@requirement(
    "LAW-008",
    "Merged, unmerged and with the update written into the base layer by hand: three times the same output.",
    SAME,
    "write merge",
    lambda i: layers(i, MERGEABLE, ("float32", "float64")),
)
def law_008(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    W = spec.W + oracle.delta(state.A, state.B, state.scaling)
    if spec.dtype == "float32":
        W = W.astype(np.float32).astype(np.float64)
    plain = implementation.layer(spec.but(W=W))
    plain.write(state.A, np.zeros_like(state.B))
    before = layer.forward(x)
    layer.merge()
    bound = oracle.forward(spec, state, x)[1]
    check.close(layer.forward(x), before, bound, spec.dtype, "merged, against unmerged", 16)
    check.close(plain.forward(x), before, bound, spec.dtype, "by hand, against unmerged", 16)


@requirement(
    "LAW-009",
    "Rank r is the sum of r adapters of rank 1.",
    "B A is the sum of its outer products (D1)",
    "write alpha",
    lambda i: layers(i, LINEAR, b=None, use_rslora=False),
)
def law_009(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    total = oracle.apply(spec, spec.W, None, x)
    for k in range(spec.r):
        one = implementation.layer(spec.but(r=1, lora_alpha=spec.scaling))
        one.write(state.A[k : k + 1], state.B[:, k : k + 1])
        total = total + one.forward(x) - oracle.apply(spec, spec.W, None, x)
    bound = oracle.forward(spec, state, x)[1] + spec.r * oracle.apply_bound(spec, spec.W, None, x)
    check.close(layer.forward(x), total, bound, spec.dtype, "the output", 16)


@requirement(
    "LAW-010",
    "Turning the r directions into one another changes nothing: (B Q)(Q^T A) = B A.",
    SAME,
    "write merge",
    lambda i: layers(i, LINEAR, r=4) if "large_r" in i.claims else layers(i, LINEAR, r=1),
)
def law_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    one, state = made(implementation, spec)
    turn = np.eye(spec.r)[::-1] * np.array([(-1.0) ** k for k in range(spec.r)])
    two = implementation.layer(spec)
    two.write(turn.T @ state.A, state.B @ turn)
    one.merge()
    two.merge()
    bound = abs(spec.W) + oracle.delta_bound(state.A, state.B, state.scaling)
    check.close(two.read().W, one.read().W, bound, spec.dtype, "the merged weight", 16)


NAMES = ({"a.proj": "up", "a.up": "proj", "head": "a.head2"}, {"a.proj": "p1", "a.up": "p", "head": "pp"})


@requirement(
    "LAW-011",
    "What modules are called does not matter, names that are parts of one another included.",
    "N2",
    "model write",
    lambda i: st.tuples(small(i), st.sampled_from(NAMES)),
)
def law_011(implementation: Implementation, case: tuple[ModelSpec, dict[str, str]], check: Check) -> None:
    spec, names = case
    modules = {names.get(name, name): module for name, module in spec.modules.items()}
    targets = [names.get(name, name) for name in ("a.proj", "a.up", "head")]
    renamed = ModelSpec(modules, {**spec.config, "target_modules": targets}, spec.dtype, spec.seed)
    model = implementation.model(renamed)
    check.equal(sorted(model.adapted()), sorted(targets), "the adapted modules")
    states = fill(model, renamed)
    gives(check, model, renamed, [states], "the output of the renamed model")


@requirement(
    "LAW-012",
    "The order of target_modules does not matter.",
    "a list of names is a set (N2)",
    "model",
    lambda i: small(i),
)
def law_012(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    turned = spec.but(target_modules=list(spec.config["target_modules"])[::-1])
    one, two = implementation.model(spec), implementation.model(turned)
    check.that(two.adapted() == one.adapted(), f"adapted: {two.adapted()}, in the other order {one.adapted()}")


@requirement(
    "LAW-013",
    "An adapter that is added and never set changes nothing: not the output, not merging, not unloading.",
    "U7",
    "model adapters merge unload write",
    lambda i: small(i),
)
def law_013(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    model.add("idle", spec.config)
    fill(model, spec, "idle", salt=1)
    gives(check, model, spec, [states], "the output")
    model.merge()
    holds(check, model.base(), spec, [states], "the merged model")
    holds(check, model.unload(merge=True), spec, [states], "the merged and unloaded model")


@requirement(
    "LAW-014",
    "Two adapters that are active together are the one that cat makes of them with weights 1.",
    "U7, U9",
    "model adapters weighted summed write",
    lambda i: small(i),
)
def law_014(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    first = fill(model, spec)
    model.add("second", {**spec.config, "r": 1, "lora_alpha": 4.0})
    second = fill(model, spec, "second", salt=1)
    x = model_inputs(spec)
    model.set(["default", "second"])
    together = model.forward(x)
    model.combine(["default", "second"], [1.0, 1.0], "both", "cat")
    model.set(["both"])
    size = output(spec, [first, second], x)[1]
    check.close(model.forward(x), together, size, spec.dtype, "the output of the combination", 16.0 * len(spec.modules))


@requirement(
    "LAW-015",
    "Merging and unmerging many times leaves the output where it was, within the rounding of so many sums.",
    "T3",
    "model merge unmerge write",
    lambda i: small(i),
    slow=2,
)
def law_015(implementation: Implementation, spec: ModelSpec, check: Check) -> None:
    model = implementation.model(spec)
    states = fill(model, spec)
    for _ in range(5):
        model.merge()
        model.unmerge()
    x = model_inputs(spec)
    want, size = output(spec, [states], x)
    check.close(model.forward(x), want, size, spec.dtype, "the output after 5 rounds", 80.0 * len(spec.modules))
