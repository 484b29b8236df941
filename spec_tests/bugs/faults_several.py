"""Faults about several active adapters, of which one is merged or deleted."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug
from .faults_contexts import MERGES, OFF, left

LEFT = "left = [name for name in self.active() if name != adapter]"
TRAINS = "self.trains = set(self.active()) if adapter in self.trains else self.trains"
DELETED = "del self.configs[adapter]"
PARTLY = "any(0 < len(site.merged) < len(site.active) for site in self.sites.values())"
LOSES = "[setattr(site, 'held', site.W) for site in self.sites.values()]"
KEEPS = "[setattr(site, 'W', site.held) for site in self.sites.values() if site.merged]"
UNLOADED = "W, b = site.held if merge and site.merged else site.W, site.b"
UNMERGE = "def unmerge(self) -> None:\n        self.merged = []"
OF_ALL = "def unmerge(self) -> None:\n        for site in self.sites.values():"
NOT_FINITE = 'raise ValueError("the merged weight would not be finite")'
ACTIVE = "return list(next(iter(self.sites.values())).active)"

BUGS: tuple[Bug, ...] = (
    Bug(
        "one_of_two_stays_active_when_deleted",
        TRAINS,
        "for site in self.sites.values():\n            site.active = [*site.active, adapter] if adapter in self.trains and len(self.trains) > 1 else site.active\n        self.trains = set(left or self.active()) if adapter in self.trains else self.trains",
        PEFT + "issues/3512",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "deleting_one_of_two_freezes_the_other",
        LEFT,
        LEFT + "\n        self.trains = set() if left and adapter in self.active() else self.trains",
    ),
    Bug(
        "deleting_one_of_two_switches_off_the_other",
        LEFT,
        LEFT
        + "\n        for site in (s for s in self.sites.values() if left and adapter in s.active):\n            site.enabled = False",
    ),
    Bug(
        "a_partly_merged_model_stays_on_in_a_context",
        OFF,
        OFF.replace("self.enable(False)", f"self.enable({PARTLY})"),
    ),
    Bug(
        "a_partly_merged_model_is_off_after_a_context",
        OFF,
        left(f"self.enable(before and not {PARTLY})"),
    ),
    Bug(
        "deleting_an_active_adapter_loses_the_merge",
        DELETED,
        DELETED + f"\n        {LOSES} if adapter in self.active() else None",
    ),
    Bug(
        "deleting_an_active_adapter_keeps_the_merge",
        DELETED,
        DELETED + f"\n        {KEEPS} if adapter in self.active() else None",
    ),
    Bug(
        "unloading_leaves_out_what_was_not_merged_yet",
        "if merge:\n            self.merge()",
        "if merge and not any(site.merged for site in self.sites.values()):\n            self.merge()",
    ),
    Bug(
        "a_partly_merged_model_is_unloaded_merged",
        UNLOADED,
        f"W, b = site.held if site.merged and (merge or {PARTLY}) else site.W, site.b",
    ),
    Bug(
        "beside_a_merged_adapter_another_is_saved_as_zero",
        "A, B = a.A, a.B\n                if a.moved",
        "A, B = a.A, a.B * (not site.merged or adapter in site.merged)\n                if a.moved",
    ),
    Bug(
        "combining_leaves_out_what_is_merged",
        "strict=True) if n in site.adapters]\n            if pairs:",
        "strict=True) if n in site.adapters and n not in site.merged]\n            if pairs:",
    ),
    Bug(
        "what_is_merged_is_not_active",
        ACTIVE,
        "return [n for n in next(iter(self.sites.values())).active if all(n not in s.merged for s in self.sites.values())]",
    ),
    Bug("unmerging_keeps_one_active", UNMERGE, UNMERGE + "\n        self.active = self.active[:1]"),
    Bug(
        "unmerging_freezes_all",
        OF_ALL,
        OF_ALL.replace("for site", "self.trains = set()\n        for site"),
    ),
    Bug("setting_an_adapter_does_not_unmerge", "self.unmerge()\n        self.trains", "self.trains"),
    Bug(
        "unmerging_twice_subtracts_twice",
        UNMERGE,
        "def unmerge(self) -> None:\n        self.W, self.held = (self.W, self.held) if self.merged else (2 * self.W - self.held, self.W)\n        self.merged = []",
    ),
    Bug(
        "a_second_merge_is_not_checked",
        "if safe and not np.isfinite(held).all():",
        "if safe and not self.merged and not np.isfinite(held).all():",
    ),
    Bug("a_refused_merge_takes_out_the_first", NOT_FINITE, "self.merged = []\n            " + NOT_FINITE),
    Bug("a_refused_merge_keeps_the_first_for_good", NOT_FINITE, "self.W = self.held\n            " + NOT_FINITE),
    Bug(
        "merging_one_makes_it_the_only_active",
        MERGES,
        MERGES + "\n        for site in self.sites.values():\n            site.active = list(names)",
    ),
)
