"""Faults in merged copies of a layer."""

# ruff: noqa: E501

from __future__ import annotations

from .bug import Bug

MADE = '        W, _ = self.site.merge(["default"], False)\n'
GIVEN = "return self.site.side(W), self.site.b"
BUGS: tuple[Bug, ...] = (
    Bug(
        "a_copy_without_the_scaling",
        MADE,
        MADE
        + '        a = self.site.adapters["default"]\n        W = W if not a.s or self.site.merged else self.site.W + self.site.delta(a) / a.s\n',
        "ml-explore/mlx-examples/issues/622",
    ),
    Bug("a_copy_without_the_update", MADE, "        W = self.site.W\n", "ml-explore/mlx-examples/issues/425"),
)
MUTANTS: tuple[Bug, ...] = (
    Bug("a_copy_without_the_bias", GIVEN, "return self.site.side(W), None"),
    Bug(
        "making_a_copy_merges_the_layer",
        MADE,
        '        W, merged = self.site.merge(["default"], False)\n        self.site.held, self.site.merged = W, merged\n',
    ),
    Bug(
        "making_a_copy_adds_to_the_weight",
        MADE,
        MADE
        + '        self.site.W = self.site.held = W\n        self.site.adapters["default"].B = 0 * self.site.adapters["default"].B\n',
    ),
    Bug(
        "a_copy_is_made_once",
        MADE,
        '        W, _ = self.__dict__.setdefault("_made", self.site.merge(["default"], False))\n',
    ),
    Bug(
        "copies_share_their_memory",
        GIVEN,
        'self._held = self.__dict__.get("_held", W * 1.0); self._held[...] = W; return self.site.side(self._held), self.site.b',
    ),
    Bug(
        "making_a_copy_changes_the_bias",
        GIVEN,
        "return self.site.side(W), None if self.site.b is None else self.site.b + 1",
    ),
    Bug(
        "making_a_copy_loses_the_factors",
        GIVEN,
        'a = self.site.adapters["default"]; a.A = 0 * a.A; return self.site.side(W), self.site.b',
    ),
    Bug(
        "making_a_copy_doubles_b_and_halves_s",
        GIVEN,
        'a = self.site.adapters["default"]; a.B, a.s = a.B * 2, a.s / 2; return self.site.side(W), self.site.b',
    ),
    Bug(
        "a_copy_of_the_first_factors",
        GIVEN,
        'a = self.site.adapters["default"]; W = W if "_seen" not in self.__dict__ else 2 * W - self.site.W; self._seen = True; return self.site.side(W), self.site.b',
    ),
    Bug(
        "making_a_copy_switches_the_layer_off",
        GIVEN,
        "self.site.enabled = False; return self.site.side(W), self.site.b",
    ),
)
