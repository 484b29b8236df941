"""lora_dropout: on the input of A, in training only."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from .. import oracle
from ..check import Check
from ..contract import MESH, Array, Implementation, LayerSpec, ModelSpec, ModuleSpec
from ..generate import CONVOLUTIONS, LINEAR, claimed, inputs, layers, scales, seeds
from ..registry import requirement
from .forward import made

DROPOUT = "LoRA, arXiv 2106.09685, appendix D; PEFT's documentation of lora_dropout (P1)"
N, TOKENS = 8, (16, 32)
RATES = st.sampled_from((0.25, 0.5, 0.75))
DROPPABLE = (*LINEAR, *CONVOLUTIONS)


@st.composite
def transparent(draw: Any, implementation: Implementation, kinds: tuple[str, ...] = LINEAR) -> LayerSpec:
    """A layer whose branch can be seen through: W = 0 and, once `see` has set A and B to 1, D = s * 1."""
    kind = draw(st.sampled_from(claimed(implementation, kinds)))
    W = np.zeros((N, N, *[1] * MESH[kind]))
    alpha = draw(st.sampled_from((8.0, 16.0) if scales(implementation) else (8.0,)))
    return LayerSpec(kind, W, r=N, lora_alpha=alpha, lora_dropout=draw(RATES), seed=draw(seeds))


def see(implementation: Implementation, spec: LayerSpec, seed: int, train: bool = True) -> Array:
    """The mask that dropout multiplied the ones of an input with: 0 and 1 / (1 - p)."""
    layer = implementation.layer(spec)
    dims = MESH[spec.kind]
    layer.write(np.eye(N).reshape(N, N, *[1] * dims), np.eye(N))
    x = np.ones((16, N, *{1: (32,), 2: (4, 8), 3: (2, 4, 4)}[dims]) if dims else (*TOKENS, N))
    return layer.forward(x, train=train, seed=seed) / spec.scaling


def _mask(id: str, kinds: tuple[str, ...], what: str) -> None:
    @requirement(
        id,
        f"In training each number of the input of A is 0, or with probability 1 - p divided by 1 - p ({what}).",
        DROPOUT,
        {"write", "dropout", *(kinds if len(kinds) == 1 else ())},
        lambda i: transparent(i, kinds),
        slow=2,
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        p = spec.lora_dropout
        mask = see(implementation, spec, spec.seed)
        kept = mask > 0.5 / (1 - p)
        check.close(mask, kept / (1 - p), 1 / (1 - p), spec.dtype, "the input of A, which was 1")
        # 6.5 standard deviations of the binomial distribution: wrong once in 10**10 runs
        check.that(
            abs(kept.mean() - (1 - p)) < 6.5 * (p * (1 - p) / kept.size) ** 0.5,
            f"of {kept.size} numbers {kept.mean():.3f} are kept, must be about {1 - p}",
        )


_mask("DROP-001", LINEAR, "linear")
_mask("DROP-002", ("conv1d",), "conv1d")
_mask("DROP-003", ("conv2d",), "conv2d")
_mask("DROP-004", ("conv3d",), "conv3d")


@requirement(
    "DROP-005",
    "Dropout is elementwise: some tokens, and some features, are dropped in part.",
    DROPOUT,
    "write dropout",
    lambda i: transparent(i),
    slow=2,
)
def drop_005(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    kept = see(implementation, spec, spec.seed).reshape(-1, N) > 0
    for axis, what in ((1, "token"), (0, "feature")):
        mixed = kept.any(axis) & ~kept.all(axis)
        check.that(mixed.any(), f"each {what} is kept or dropped as a whole")


@requirement(
    "DROP-006",
    "Two seeds give two masks, and the same seed the same.",
    DROPOUT,
    "write dropout",
    lambda i: transparent(i),
    slow=2,
)
def drop_006(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    first, again, other = (see(implementation, spec, seed) for seed in (1, 1, 2))
    check.equal(again, first, "the output of the same seed")
    check.that((other != first).any(), "two seeds gave the same mask")


@requirement(
    "DROP-007",
    "In evaluation nothing is dropped, also after a pass in training mode.",
    DROPOUT,
    "write dropout",
    lambda i: layers(i, DROPPABLE, lora_dropout=0.5),
)
def drop_007(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    want, bound = oracle.forward(spec, state, x)
    check.close(layer.forward(x), want, bound, spec.dtype, "the output")
    layer.forward(x, train=True, seed=1)
    check.close(layer.forward(x), want, bound, spec.dtype, "the output after a pass in training mode")


@requirement(
    "DROP-008",
    "The base layer sees the whole input in training too.",
    DROPOUT,
    "write dropout",
    lambda i: layers(i, DROPPABLE, lora_dropout=0.5),
)
def drop_008(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.write(state.A, np.zeros_like(state.B))
    x = inputs(spec)
    y = layer.forward(x, train=True, seed=spec.seed)
    base, bound = (f(spec, spec.W, spec.b, x) for f in (oracle.apply, oracle.apply_bound))
    check.close(y, base, bound, spec.dtype, "the output with B = 0 in training")


@requirement(
    "DROP-009",
    "lora_dropout = 0 drops nothing in training.",
    DROPOUT,
    "write",
    lambda i: layers(i, DROPPABLE),
)
def drop_009(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    check.close(layer.forward(x, train=True), *oracle.forward(spec, state, x), spec.dtype, "the output in training")


@requirement(
    "DROP-010",
    "With lora_dropout = 1 the branch is 0 in training and whole in evaluation, or it is refused.",
    "P4; torch.nn.Dropout takes p in [0, 1]",
    "write dropout",
    lambda i: layers(i, DROPPABLE, lora_dropout=1.0),
)
def drop_010(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    try:
        layer, state = made(implementation, spec)
    except Exception:
        return
    x = inputs(spec)
    base, bound = (f(spec, spec.W, spec.b, x) for f in (oracle.apply, oracle.apply_bound))
    check.close(layer.forward(x, train=True), base, bound, spec.dtype, "the output in training")
    check.close(layer.forward(x), *oracle.forward(spec, state, x), spec.dtype, "the output in evaluation")


@requirement(
    "DROP-011",
    "A merged layer drops nothing, in training mode either.",
    "LoRA, arXiv 2106.09685, section 4.1: the merged layer is a plain one (P2)",
    "write dropout merge",
    lambda i: layers(i, DROPPABLE, lora_dropout=0.5),
)
def drop_011(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    x = inputs(spec)
    layer.merge()
    y = layer.forward(x, train=True, seed=spec.seed)
    check.close(y, *oracle.forward(spec, state, x), spec.dtype, "the merged output in training")


@requirement(
    "DROP-012",
    "A layer whose adapter is switched off drops nothing.",
    "PEFT's documentation of disable_adapter (P1, U2)",
    "write dropout disable",
    lambda i: layers(i, DROPPABLE, lora_dropout=0.5),
)
def drop_012(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.enable(False)
    x = inputs(spec)
    base, bound = (f(spec, spec.W, spec.b, x) for f in (oracle.apply, oracle.apply_bound))
    check.close(layer.forward(x, train=True, seed=spec.seed), base, bound, spec.dtype, "the output, switched off")


@requirement(
    "DROP-013",
    "An embedding takes indices, which are not dropped: lora_dropout changes nothing.",
    "PEFT and loralib: no dropout in Embedding (P3)",
    "embedding write dropout",
    lambda i: layers(i, ("embedding",), lora_dropout=0.5),
)
def drop_013(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    if implementation.conventions.get("embedding_dropout", False):
        return
    layer, state = made(implementation, spec)
    x = inputs(spec)
    y = layer.forward(x, train=True, seed=spec.seed)
    check.close(y, *oracle.forward(spec, state, x), spec.dtype, "the output in training")


@requirement(
    "DROP-014",
    "Each active adapter draws a mask of its own.",
    "PEFT: every adapter has its own dropout layer (P2)",
    "model adapters dropout summed write",
    lambda i: seeds,
    slow=4,
)
def drop_014(implementation: Implementation, seed: int, check: Check) -> None:
    config = {"r": N, "lora_alpha": N, "lora_dropout": 0.5, "target_modules": ["m"]}
    model = implementation.model(ModelSpec({"m": ModuleSpec("linear", np.zeros((N, N)))}, config, seed=seed))
    model.add("other", config)
    model.set(["default", "other"])
    model.write("m", np.eye(N), np.eye(N))
    model.write("m", np.eye(N), 4 * np.eye(N), "other")
    y = model.forward(np.ones((256, N)), train=True, seed=seed)  # 2 m + 8 m' with masks m, m' of 0 and 1
    check.equal(sorted(set(np.unique(y))), [0.0, 2.0, 8.0, 10.0], "the values of 2 m + 8 m'")


@requirement(
    "DROP-015",
    "Dropout of a convolution is elementwise too: some channels of some samples are dropped in part.",
    DROPOUT,
    "write dropout",
    lambda i: transparent(i, CONVOLUTIONS),
    slow=2,
)
def drop_015(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    kept = see(implementation, spec, spec.seed) > 0
    kept = kept.reshape(*kept.shape[:2], -1)  # (16, N, 32)
    for axis, what in ((2, "channel of a sample"), (1, "place of a sample"), (0, "place of a channel")):
        mixed = kept.any(axis) & ~kept.all(axis)
        check.that(mixed.any(), f"each {what} is kept or dropped as a whole")


@requirement(
    "DROP-016",
    "It is the input of A that is dropped, not A x and not the branch.",
    DROPOUT,
    "write dropout",
    lambda i: transparent(i),
    slow=2,
)
def drop_016(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    narrow = spec.but(r=1, lora_alpha=spec.lora_alpha / N)
    layer = implementation.layer(narrow)
    layer.write(2.0 ** np.arange(N)[None], np.ones((N, 1)))  # A x is a number whose binary digits are the mask
    s, p = narrow.scaling, spec.lora_dropout
    y = layer.forward(np.ones((*TOKENS, N)), train=True, seed=spec.seed) * (1 - p) / s
    digits = np.round(y)
    check.close(y, digits, 2.0**N, spec.dtype, "(1 - p) A x, an integer")
    check.equal(digits, np.broadcast_to(digits[..., :1], digits.shape), "the outputs of a token, where B is all ones")
    found = np.setdiff1d(digits, (0.0, 2.0**N - 1))
    check.that(found.size, "A x is dropped as a whole, not the numbers of x")
