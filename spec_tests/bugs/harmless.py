"""Harmless variants of `plain`: everything that a requirement leaves open, done otherwise. All of them must pass."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

import functools
from typing import Any

from ..contract import Implementation
from .seeded import compiled, source

STATIC = "return rng.uniform(-bound, bound, shape_A), np.zeros(shape_B)"
MASK = "x = x * (rng.random(x.shape) >= p) / (1 - p) if p < 1 else 0 * x"
BRANCH = "return adapter.s * (x @ turned(A) @ turned(B))"
DELTA = "return adapter.s * self.side(adapter.B @ adapter.A)"
WRITE = "adapter.A, adapter.B = rounded(A, self.fine), rounded(B, self.fine)"
OFF = 'return {"x": dx, "A": None, "B": None, "W": None, "b": None}'
UNMERGE = "    def unmerge(self) -> None:\n        self.merged = []"
SUBTRACT = (  # what was added, as the finer dtype holds it
    "    def unmerge(self) -> None:\n"
    "        if self.merged:\n"
    "            self.W = rounded(self.held - rounded(self.held - self.W, self.fine), self.dtype)\n"
    "        self.merged = []"
)

# name: (what is replaced, by what), and the claims that it gives up
VARIANTS: dict[str, tuple[list[tuple[str, str]], frozenset[str]]] = {
    "factors in column order": (
        [(WRITE, "adapter.A, adapter.B = (np.asfortranarray(rounded(v, self.fine)) for v in (A, B))")],
        frozenset(),
    ),
    "kaiming written otherwise": (
        [(STATIC, "return bound * (2 * rng.random(shape_A) - 1), np.zeros(shape_B)")],
        frozenset(),
    ),
    "(B A) x": ([(BRANCH, "return x @ turned(adapter.s * (B @ A))")], frozenset()),
    "B (A (s x))": ([(BRANCH, "return (x * adapter.s) @ turned(A) @ turned(B)")], frozenset()),
    "the update in the precision of the factors": (
        [(DELTA, "return rounded(adapter.s * rounded(self.side(adapter.B @ adapter.A), self.fine), self.fine)")],
        frozenset(),
    ),
    "the branch in the precision of the factors": (
        [(BRANCH, "return rounded(adapter.s * rounded(rounded(x @ turned(A), self.fine) @ turned(B), self.fine), self.fine)")],
        frozenset(),
    ),
    "the output of the base is rounded first": (
        [("y = self.plain(x, W, b)", "y = rounded(self.plain(x, W, b), self.dtype)")],
        frozenset(),
    ),
    "unmerging subtracts": ([(UNMERGE, SUBTRACT)], frozenset({"exact_unmerge"})),
    "another generator": (
        [
            ("        rng = np.random.default_rng(spec.seed)", "        rng = np.random.Generator(np.random.Philox(spec.seed))"),
            ("return np.random.default_rng(seed)", "return np.random.Generator(np.random.MT19937(seed))"),
        ],
        frozenset(),
    ),
    "the dropout mask drawn in another order": ([(MASK, MASK.replace("rng.random(x.shape)", "rng.random(x.shape[::-1]).T"))], frozenset()),
    "the dropout mask of the other half": ([(MASK, MASK.replace("rng.random(x.shape) >= p", "rng.random(x.shape) < 1 - p"))], frozenset()),
    "an integer lora_alpha": (
        [("spec.r, spec.lora_alpha, config", "spec.r, int(spec.lora_alpha) if spec.lora_alpha == int(spec.lora_alpha) else spec.lora_alpha, config")],
        frozenset(),
    ),
    "attributes that nobody asked for": (
        [("        self.site.adapters[\"default\"] = made", "        self.site.adapters[\"default\"], self.extra, self.version = made, object(), 3")],
        frozenset(),
    ),
    "gradients of zeros instead of none": (
        [(OFF, 'return {"x": dx, "A": np.zeros_like(A), "B": np.zeros_like(B), "W": None, "b": None}')],
        frozenset(),
    ),
    "singular vectors of the other sign": (
        [
            ("return root[:, None] * Vt[:r], U[:, :r] * root", "return -root[:, None] * Vt[:r], U[:, :r] * -root"),
            ("np.linalg.svd(W, full_matrices=False)[0][:, -r:]", "-np.linalg.svd(W, full_matrices=False)[0][:, -r:]"),
            ("return R[:r], Q[:, :r]", "return -R[:r], -Q[:, :r]"),
            ('/ S[:r, None] ** 0.5 if options.get("whiten") else Vt[:r]', '/ S[:r, None] ** 0.5 if options.get("whiten") else -Vt[:r]'),
        ],
        frozenset(),
    ),
    "the other rows of the orthogonal matrix": (
        [("@ Q[0::2]).T / 10", "@ Q[1::2]).T / 10"), ("@ Q[1::2] / 10", "@ Q[0::2] / 10")],
        frozenset(),
    ),
    "switching a merged layer off unmerges it": (
        [("        self.site.enabled = enabled", "        self.site.enabled, self.site.merged = enabled, []")],
        frozenset(),
    ),
    "more columns in the sketch": ([("min(r + 4, *W.shape)", "min(2 * r + 5, *W.shape)")], frozenset()),
    "the old factors are kept beside": ([(WRITE, WRITE + "\n        adapter.older = adapter.started")], frozenset()),
}  # fmt: skip


@functools.cache
def variant(name: str) -> Implementation:
    """The implementation of a variant."""
    replacements, given_up = VARIANTS[name]
    text = source()
    for old, new in replacements:
        found = text.count(old)
        assert found == 1, f"{name}: plain.py has {found} times {old!r}"
        text = text.replace(old, new)
    made: Any = compiled("harmless_" + "".join(c if c.isalnum() else "_" for c in name), text).Plain()
    made.name, made.claims = f"plain, {name}", made.claims - given_up
    return made
