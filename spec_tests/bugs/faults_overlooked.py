"""Faults about what mistakes made by hand in lora_ref showed: no requirement had looked at it."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import Bug

MERGED = 'raise ValueError(f"{adapter} is merged: unmerge first")'
ACTIVE = "return list(next(iter(self.sites.values())).active)"
NAMES = "site.active = left or list(self.configs)[:1]"

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "the_adapter_that_takes_over_is_not_named",
        ACTIVE,
        ACTIVE + ' if "default" in self.configs else []',
    ),
    Bug(
        "what_both_names_target_is_adapted_twice",
        "name = self.same.get(step, step)",
        "name = self.same.get(step, step)\n            if step in self.same and step.rpartition('.')[2] in (self.configs['default']['target_modules'] or []):\n                x = x + self.sites[name].forward(x, names, rng) - self.sites[name].forward(x, [], rng)",
    ),
    Bug("deleting_the_active_adapter_leaves_none_active", NAMES, "site.active = left"),
    Bug(
        "deleting_one_of_two_merged_keeps_its_update",
        "if any(adapter in site.merged for site in self.sites.values()):",
        "if all(site.merged == [adapter] for site in self.sites.values()):",
    ),
    Bug(
        "lora_ga_has_one_direction_setting",
        'if options.get("direction") == "ArB2r":',
        "if False:",
    ),
)
