"""Faults of convolutions that their update shows."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

UPDATE = 'return self.site.side(self.site.delta(self.site.adapters["default"]))'
SUM = "held = rounded(sum((self.delta(self.adapters[name]) for name in everything), held), self.dtype)"
BRANCH = "return adapter.s * np.moveaxis(self.convolved(x, A) @ B.T, -1, 1)"
WRITES = "B = B * self.owned(adapter.r)\n        adapter.A, adapter.B ="
BACK = "    def unmerge(self) -> None:\n        self.site.unmerge()"

BUGS: tuple[Bug, ...] = (
    Bug(
        "a_convolution_is_merged_with_its_kernel_turned",
        SUM,
        SUM + "\n        held = held[..., ::-1] if MESH.get(self.kind) else held",
        PEFT + "pull/637",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "the_update_of_a_convolution_is_flat",
        UPDATE,
        'D = self.site.side(self.site.delta(self.site.adapters["default"]))\n        return D.reshape(len(D), -1) if MESH.get(self.site.kind) else D',
    ),
    Bug(
        "the_update_of_a_convolution_is_not_scaled",
        UPDATE,
        'a = self.site.adapters["default"]\n        return self.site.side(self.site.delta(a)) / a.s if a.s != 0 else 0 * self.site.side(self.site.delta(a))',
    ),
    Bug(
        "the_factors_of_a_convolution_cannot_be_set",
        WRITES,
        "B = 0 * B if MESH.get(self.kind) else B\n        " + WRITES,
    ),
    Bug(
        "a_convolution_is_merged_twice",
        SUM,
        SUM.replace("everything)", "(everything * 2 if MESH.get(self.kind) else everything))"),
    ),
    Bug(
        "a_merged_convolution_adds_its_branch",
        "if name in self.adapters and name not in self.merged:\n                y = y + self.branch",
        "if name in self.adapters and (MESH.get(self.kind) or name not in self.merged):\n                y = y + self.branch",
    ),
    Bug(
        "an_unmerged_convolution_keeps_the_update",
        BACK,
        "    def unmerge(self) -> None:\n        if self.site.merged and MESH.get(self.site.kind):\n            self.site.W = self.site.held\n            self.site.adapters['default'].B = 0 * self.site.adapters['default'].B\n        self.site.unmerge()",
    ),
    Bug(
        "an_unmerged_convolution_has_lost_its_update",
        BACK,
        BACK + "\n        if MESH.get(self.site.kind):\n            self.site.adapters['default'].s = 0.0",
    ),
    Bug(
        "a_convolution_cannot_be_switched_off",
        "names = self.active if self.enabled else []",
        "names = self.active if self.enabled or MESH.get(self.kind) else []",
    ),
)
