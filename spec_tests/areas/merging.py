"""Merging one layer's update into its weight, and taking it out again."""

from __future__ import annotations

from hypothesis import strategies as st

from .. import oracle
from ..check import UNIT, Check
from ..contract import Array, Implementation, LayerSpec, LayerState
from ..generate import LINEAR, MERGEABLE, inputs, layers
from ..registry import requirement
from .forward import made

MERGE = "LoRA, arXiv 2106.09685, section 4.1: no additional inference latency (U1)"


def merged(spec: LayerSpec, state: LayerState) -> tuple[Array, Array]:
    """W + s B A of the weight that the layer was made with, and its bound."""
    D = oracle.delta(state.A, state.B, state.scaling)
    return spec.W + D, abs(spec.W) + oracle.delta_bound(state.A, state.B, state.scaling)


def _merged_weight(id: str, kind: str) -> None:
    @requirement(
        id, f"Merging makes the weight W + s B A ({kind}).", MERGE, f"{kind} write merge", lambda i: layers(i, (kind,))
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        layer, state = made(implementation, spec)
        layer.merge()
        check.close(layer.read().W, *merged(spec, state), spec.dtype, "the merged weight")


_merged_weight("MERGE-001", "linear")
_merged_weight("MERGE-002", "transposed")
_merged_weight("MERGE-003", "embedding")
_merged_weight("MERGE-004", "conv1d")
_merged_weight("MERGE-005", "conv2d")
_merged_weight("MERGE-006", "conv3d")
_merged_weight("MERGE-007", "parameter")
_merged_weight("MERGE-008", "experts")


def _merged_output(id: str, kind: str) -> None:
    @requirement(
        id,
        f"A merged layer gives what it gave before, within rounding ({kind}).",
        MERGE,
        f"{kind} write merge",
        lambda i: layers(i, (kind,)),
    )
    def body(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
        layer, state = made(implementation, spec)
        x = inputs(spec)
        want, bound = oracle.forward(spec, state, x)
        layer.merge()
        check.close(layer.forward(x), want, bound, spec.dtype, "the output after merging")


_merged_output("MERGE-011", "linear")
_merged_output("MERGE-012", "transposed")
_merged_output("MERGE-013", "embedding")
_merged_output("MERGE-014", "conv1d")
_merged_output("MERGE-015", "conv2d")
_merged_output("MERGE-016", "conv3d")
_merged_output("MERGE-017", "parameter")
_merged_output("MERGE-018", "experts")


@requirement(
    "MERGE-020",
    "With integers and a scaling that is a power of two the merged weight is exact.",
    MERGE,
    "write merge",
    lambda i: layers(i, MERGEABLE, ("float64", "float32"), exact=True),
)
def merge_020(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec, exact=True)
    layer.merge()
    check.equal(layer.read().W, merged(spec, state._replace(scaling=spec.scaling))[0], "the merged weight")


@requirement("MERGE-021", "Merging twice is merging once.", "U1", "write merge", lambda i: layers(i))
def merge_021(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.merge()
    once = layer.read().W
    layer.merge()
    check.equal(layer.read().W, once, "the weight merged twice")


@requirement(
    "MERGE-022",
    "Unmerging gives the base weight back, within the rounding of one sum.",
    "T3",
    "write merge unmerge",
    layers,
)
def merge_022(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merge()
    layer.unmerge()
    # (W + D) - D: two roundings of numbers as large as |W| + |D|
    check.close(layer.read().W, spec.W, merged(spec, state)[1], spec.dtype, "the weight after unmerging")


@requirement("MERGE-023", "Unmerging without a merge changes nothing.", "U1", "write merge unmerge", layers)
def merge_023(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, _ = made(implementation, spec)
    layer.unmerge()
    check.equal(layer.read().W, spec.W, "the weight")


@requirement("MERGE-024", "After merging and unmerging the branch acts again.", "U1", "write merge unmerge", layers)
def merge_024(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merge()
    layer.unmerge()
    x = inputs(spec)
    want, bound = oracle.forward(spec, state, x)
    D = oracle.delta_bound(state.A, state.B, state.scaling)
    bound = bound + oracle.apply_bound(spec, D, None, x)  # what unmerging has left in the weight
    check.close(layer.forward(x), want, bound, spec.dtype, "the output")


@requirement("MERGE-025", "Merging leaves A, B and s alone.", "U1", "write merge", layers)
def merge_025(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merge()
    after = layer.read()
    for name in ("A", "B", "scaling"):
        check.equal(getattr(after, name), getattr(state, name), name)


@requirement("MERGE-026", "Merging does not touch the bias.", "B5", "write merge linear", lambda i: layers(i, LINEAR))
def merge_026(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    spec = spec.but(b=spec.W[:, 0] + 0.5)
    layer, _ = made(implementation, spec)
    layer.merge()
    check.equal(layer.read().b, spec.b, "the bias")


@requirement(
    "MERGE-027",
    "In half precision the update is computed in at least float32 and rounded once.",
    "lora_ref's decision (T3): no document says in which dtype s B A is computed",
    "write merge decision:half_merge",
    lambda i: layers(i, MERGEABLE, ("float16", "bfloat16")),
)
def merge_027(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    want, bound = merged(spec, state)
    if bound.max() > 6e4:
        return
    layer.merge()
    # D is rounded to the dtype, and so is the sum: half a unit of each, with a little for float32 before
    unit = abs(want - spec.W) + abs(want) + bound * UNIT["float32"] / UNIT[spec.dtype] * 16
    check.close(layer.read().W, want, unit, spec.dtype, "the merged weight", factor=1.01)


@requirement(
    "MERGE-028", "Merging, unmerging and merging again gives the merged weight.", "U1", "write merge unmerge", layers
)
def merge_028(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    for _ in range(2):
        layer.merge()
        layer.unmerge()
    layer.merge()
    want, bound = merged(spec, state)
    check.close(layer.read().W, want, 3 * bound, spec.dtype, "the merged weight")


@requirement(
    "MERGE-029",
    "Unmerging gives the base weight back bit for bit, in every dtype.",
    "lora_ref's decision (T3): PEFT's documentation of unmerge_adapter says nothing of rounding",
    "write merge exact_unmerge unmerge",
    lambda i: layers(i, MERGEABLE, ("float64", "float32", "float16", "bfloat16")),
)
def merge_029(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    if merged(spec, state)[1].max() > 6e4:
        return
    layer.merge()
    layer.unmerge()
    check.equal(layer.read().W, spec.W, "the weight after unmerging")


@requirement(
    "MERGE-030",
    "A safe merge that would write NaN or infinite weights is refused, and nothing is changed.",
    "PEFT's documentation of safe_merge (U4)",
    "write merge safe_merge",
    lambda i: st.tuples(layers(i, LINEAR), st.sampled_from((float("nan"), float("inf")))),
)
def merge_030(implementation: Implementation, case: tuple[LayerSpec, float], check: Check) -> None:
    spec, bad = case
    spec = spec.but(lora_alpha=1.0)
    layer, state = made(implementation, spec)
    A = state.A.copy()
    A[0, 0] = bad
    layer.write(A, state.B)
    check.refused(lambda: layer.merge(safe=True), "a merge that makes the weight NaN or infinite")
    check.equal(layer.read().W, spec.W, "the weight after the refused merge")


@requirement(
    "MERGE-031",
    "What is written to A and B after a merge acts after unmerging and merging again, not before.",
    "U1",
    "write merge unmerge",
    layers,
)
def merge_031(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merge()
    layer.unmerge()
    layer.write(2 * state.A, state.B)
    layer.merge()
    want, bound = merged(spec, state._replace(A=2 * state.A))
    check.close(layer.read().W, want, 2 * bound, spec.dtype, "the merged weight")


@requirement(
    "MERGE-032",
    "Merging changes an embedding's row at padding_idx as any other.",
    "torch.nn.Embedding: padding_idx is about the gradient alone (D4)",
    "embedding padding_idx write merge",
    lambda i: layers(i, ("embedding",), padding_idx=0),
)
def merge_032(implementation: Implementation, spec: LayerSpec, check: Check) -> None:
    layer, state = made(implementation, spec)
    layer.merge()
    check.close(layer.read().W, *merged(spec, state), spec.dtype, "the merged weight")
