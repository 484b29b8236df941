"""Faults about models that are more than chains."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import Bug

CALL = "x = self.sites[called].forward(x, names, rng)"
TIED = 'raise ValueError(f"{name} and {other} hold one weight: a merge would change both")'
ENTERED = "self.sites[name].held, self.sites[name].merged = held, merged"

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "a_module_that_is_called_twice_has_no_branch",
        CALL,
        CALL.replace(
            "names", "[] if self.order.count(called) > 1 and names is None and not self.sites[called].merged else names"
        ),
    ),
    Bug(
        "a_module_that_is_called_twice_is_merged_twice",
        ENTERED,
        ENTERED.replace("= held", "= held + (self.order.count(name) > 1) * (held - self.sites[name].W)"),
    ),
    Bug(
        "a_module_that_is_called_twice_is_unmerged_once",
        "def unmerge(self) -> None:\n        for site in self.sites.values():",
        "def unmerge(self) -> None:\n        for name, site in self.sites.items():\n            site.W = site.held if self.order.count(name) > 1 and site.merged else site.W",
    ),
    Bug(
        "a_tied_weight_has_no_branch",
        CALL,
        CALL.replace("names", "[] if called in (*self.tied, *self.tied.values()) else names"),
    ),
    Bug(
        "a_merge_changes_both_tied_weights",
        TIED,
        "for a, b in ((name, other), (other, name)):\n                    for n in names:\n                        if n in self.sites[a].adapters:\n                            self.sites[b].W = self.sites[b].W + self.sites[a].delta(self.sites[a].adapters[n])",
    ),
    Bug(
        "no_more_than_twenty_modules_are_adapted",
        "whole = {name: name for name in found}",
        "whole = {name: name for name in found[:20]}",
    ),
    Bug(
        "many_targets_are_saved_by_their_ends",
        "c = dict(self.configs[adapter])",
        'c = dict(self.configs[adapter])\n        if len(c["target_modules"]) > 18:\n            c["target_modules"] = sorted({n.rpartition(".")[2] for n in c["target_modules"]})',
    ),
    Bug(
        "the_factors_of_layer_1_are_not_read",
        "if adapter in site.adapters:\n                site.write(adapter, *(",
        'if adapter in site.adapters and not name.startswith(("1.", "2.", "3.")):\n                site.write(adapter, *(',
    ),
    Bug(
        "a_saved_module_trains_by_the_end_of_its_name",
        "for i in range(len(p)))",
        'for i in range(len(p))) or any(n.endswith(item) for item in c["modules_to_save"] or [])',
    ),
    Bug(
        "a_saved_module_gets_the_weight_of_a_longer_name",
        'W = rounded(tensors[f"{place}.weight"], self.dtype)',
        'W = rounded([t for k, t in tensors.items() if k.endswith(f"{name}.weight") and "lora_" not in k][-1], self.dtype)',
        profile="default",
    ),
)
