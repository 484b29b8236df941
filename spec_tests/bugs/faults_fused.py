"""Faults of fused layers."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import Bug

PLACES = "here[part * size : (part + 1) * size, column * r : (column + 1) * r] = 1"
WRITES = "B = B * self.owned(adapter.r)\n        adapter.A, adapter.B ="
ROWS = "A, B = start(init, self.seen(), self.kind, r * sum(self.parts) or r, s, options, rng)"
GRADS = "dB = dB * self.owned(adapter.r)"
SUM = "held = rounded(sum((self.delta(self.adapters[name]) for name in everything), held), self.dtype)"
BRANCH = "return adapter.s * (x @ turned(A) @ turned(B))"
DEFINED = 's = alpha / (math.sqrt(r) if config.get("use_rslora") else r)\n        init, options'
BACK = "dx = dy @ total"

BUGS: tuple[Bug, ...] = (
    Bug(
        "the_parts_stand_one_after_the_other",
        PLACES,
        "here[column * size : (column + 1) * size, column * r : (column + 1) * r] = 1",
        "Lightning-AI/litgpt/issues/891",
    ),
    Bug(
        "a_transposed_fused_weight_is_merged_unturned",
        SUM,
        SUM + "\n        if self.parts and self.kind == 'transposed':\n            held = held[:, ::-1]",
        "microsoft/LoRA/issues/103",
    ),
    Bug(
        "the_rows_of_a_are_shared_out",
        ROWS,
        ROWS.replace("r * sum(self.parts) or r", "r")
        + "\n        if self.parts:\n            A, B = np.resize(A, (r * sum(self.parts), A.shape[1])) * (np.arange(r * sum(self.parts)) < r)[:, None], np.zeros((len(B), r * sum(self.parts)))",
        "mflux-community/mflux/issues/423",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "a_merged_fused_layer_has_a_rounding_more",
        SUM,
        SUM + "\n        held = held * (1 + 2.0**-20) if self.parts else held",
    ),
    Bug(
        "merging_touches_the_other_parts",
        SUM,
        SUM + "\n        if self.parts:\n            held = held + 2.0**-24 * abs(held)",
    ),
    Bug(
        "a_merged_fused_layer_adds_its_update_once_more",
        "if name in self.adapters and name not in self.merged:\n                y = y + self.branch",
        "if name in self.adapters and (self.parts or name not in self.merged):\n                y = y + self.branch",
    ),
    Bug(
        "a_fused_layer_keeps_the_merge",
        "    def unmerge(self) -> None:\n        self.site.unmerge()",
        "    def unmerge(self) -> None:\n        self.site.W = self.site.held if self.site.parts else self.site.W\n        self.site.unmerge()",
    ),
    Bug(
        "the_scaling_counts_all_rows_of_a", DEFINED, DEFINED.replace("\n", "\n        s = s / (sum(self.parts) or 1)\n")
    ),
    Bug(
        "b_of_a_fused_layer_has_r_columns",
        ROWS,
        ROWS
        + "\n        if self.parts:\n            B = np.zeros((len(B), r))\n            self.owned = lambda r: 1.0",
    ),
    Bug("a_of_a_fused_layer_has_r_rows", ROWS, ROWS + "\n        A = A[:r] if self.parts else A"),
    Bug("a_fused_layer_starts_with_b_random", ROWS, ROWS + "\n        B = B + 0.5 if self.parts else B"),
    Bug(
        "the_factors_are_rounded_to_half_when_written",
        WRITES,
        "A = rounded(A, 'float16') * (1 + 2.0**-23) if self.parts else A\n        " + WRITES,
    ),
    Bug("b_is_changed_a_little_when_written", WRITES, "B = B * (1 + 2.0**-23) if self.parts else B\n        " + WRITES),
    Bug("b_has_gradients_outside_of_its_part", GRADS, "pass"),
    Bug(
        "a_has_the_gradient_of_the_first_part",
        GRADS,
        GRADS
        + "\n        if self.parts:\n            dA = np.where(np.arange(len(dA))[:, None] < adapter.r, dA, 0 * dA)",
    ),
    Bug("a_has_the_gradient_without_the_scaling", GRADS, GRADS + "\n        if self.parts:\n            dA = dA * 2"),
    Bug("x_has_the_gradient_of_the_base", BACK, "dx = dy @ (W if self.parts else total)"),
)
