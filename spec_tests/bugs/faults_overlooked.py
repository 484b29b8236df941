"""Faults about what mistakes made by hand in lora_ref showed: no requirement had looked at it."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import Bug

MERGED = 'raise ValueError(f"{adapter} is merged: unmerge first")'
ACTIVE = "return list(next(iter(self.sites.values())).active)"
FACTORS = '{f"{place}.lora_A.weight": A, f"{place}.lora_B.weight": B}'
TRAIN = "for adapter in self.trains if self.enabled else ():"
NAMES = "site.active = left or list(self.configs)[:1]"

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "a_loaded_copy_is_float32",
        "site.copies[adapter] = [W, None",
        'site.copies[adapter] = [rounded(W, "float32"), None',
    ),
    Bug("loading_draws_numbers", "self.rng = rng  #", "rng = self.rng  #"),
    Bug(
        "lora_ga_is_scaled_by_the_inputs",
        'U, _, Vt = np.linalg.svd(options["dy"].T @ options["x"], full_matrices=False)',
        'U, _, Vt = np.linalg.svd(options["dy"].T @ options["x"], full_matrices=False)\n        out = n_in',
    ),
    Bug("a_combination_has_the_first_scaling", "concatenate([w * a.s * a.A", "concatenate([w * a.first_s * a.A"),
    Bug(
        "a_combination_scales_what_a_start_subtracts",
        "moved = [w * a.moved for",
        "moved = [w * (a.s / a.first_s) * a.moved for",
    ),
    Bug("the_file_has_a_float32_A", FACTORS, FACTORS.replace('.weight": A,', '.weight": rounded(A, "float32"),')),
    Bug("the_file_has_a_float32_B", FACTORS, FACTORS.replace(": B}", ': rounded(B, "float32")}')),
    Bug(
        "each_branch_is_rounded",
        "y = y + self.branch(x, self.adapters[name], rng)",
        "y = rounded(y + self.branch(x, self.adapters[name], rng), self.dtype)",
    ),
    Bug(
        "dropout_drops_what_a_start_subtracts",
        "            x = self.dropped(x, p, rng)",
        "            given, x = x, self.dropped(x, p, rng)\n            if adapter.moved is not None and self.kind in LINEAR:\n                return adapter.s * (x @ turned(A) @ turned(B)) + self.plain(given - x, adapter.moved, None)",
    ),
    Bug("factors_train_while_they_are_off", TRAIN, "for adapter in self.trains:"),
    Bug(
        "an_adapter_is_added_switched_on",
        "self.sites[name].adapters[adapter] = one",
        "self.sites[name].enabled = self.sites[name].enabled or not self.sites[name].adapters\n            self.sites[name].adapters[adapter] = one",
    ),
    Bug(
        "switched_on_an_added_adapter_stays_off",
        "self.enabled = enabled\n        for site in self.sites.values():\n            site.enabled = enabled",
        "self.enabled = enabled\n        for site in self.sites.values():\n            site.enabled = enabled and ('default' in site.adapters or len(self.configs) < 2)",
    ),
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
