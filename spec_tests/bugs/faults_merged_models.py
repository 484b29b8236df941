"""Faults about what happens to a merged model."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import Bug

UNMERGE = "def unmerge(self) -> None:\n        self.merged = []"
WRITE = "adapter.A, adapter.B = rounded(A, self.fine), rounded(B, self.fine)"
ADDED = "self.configs[adapter] = c\n\n    def known"
BEGUN = "c = checked(config)\n        if adapter in self.configs"
DELETED = "del self.configs[adapter]"
COMBINED = "self.known(adapters)\n        if name in self.configs"
SET = "names = self.known(adapters)\n        if not names:"
EVERY = "for name in everything), held)"
REFUSED = 'if adapter in [name for site in self.sites.values() for name in site.merged]:\n            raise ValueError(f"{adapter} is merged: its scaling cannot change")\n        '
RESCALED = "for a in [site.adapters[adapter] for site in self.sites.values() if adapter in site.adapters]:"
IN_WEIGHTS = """here = [site for site in self.sites.values() if adapter in site.merged]
        for site in here:
            a = site.adapters[adapter]
            site.held = rounded(site.W + factor * a.first_s / a.s * (site.held - site.W), self.dtype)
        if here:
            return
        """
OF_ALL = "for site in self.sites.values():"

LOSES = "[setattr(site, 'held', site.W) for site in self.sites.values()]"
KEEPS = "[setattr(site, 'W', site.held) for site in self.sites.values() if site.merged]"

BUGS: tuple[Bug, ...] = (
    Bug(
        "unmerging_takes_out_the_last_alone",
        UNMERGE,
        UNMERGE.replace("[]", "self.merged[:-1]"),
        "huggingface/diffusers/issues/5032",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "unmerging_subtracts_the_update_of_now",
        UNMERGE,
        "def unmerge(self) -> None:\n        now = [self.delta(self.adapters[name]) for name in self.merged if name in self.adapters]\n        self.W = rounded(self.held - np.sum(now, 0), self.dtype) if now else self.W\n        self.merged = []",
    ),
    Bug("a_merged_model_is_rescaled_beside_its_weights", REFUSED + RESCALED, RESCALED),
    Bug(
        "a_merged_model_is_rescaled_in_its_weights_alone",
        REFUSED + RESCALED,
        IN_WEIGHTS + RESCALED,
    ),
    Bug("rescaling_a_model_begins_from_s_of_now", "a.s = factor * a.first_s", "a.s = factor * a.s"),
    Bug("rescaling_a_model_reaches_one_layer", RESCALED, RESCALED.replace("]:", "][:1]:")),
    Bug(
        "rescaling_a_model_reaches_every_adapter",
        RESCALED,
        "for a in [a for site in self.sites.values() for a in site.adapters.values()]:",
    ),
    Bug("a_merged_layer_is_not_written", WRITE, "if not self.merged:\n            " + WRITE),
    Bug(
        "a_merged_layer_is_not_rescaled",
        'a = self.site.adapters["default"]\n        if factor is None:',
        'a = self.site.adapters["default"]\n        if self.site.merged:\n            return\n        if factor is None:',
    ),
    Bug("adding_an_adapter_loses_the_merge", ADDED, ADDED.replace("= c", "= c\n        " + LOSES)),
    Bug("adding_an_adapter_keeps_the_merge", ADDED, ADDED.replace("= c", "= c\n        " + KEEPS)),
    Bug(
        "a_refused_adapter_takes_the_merge_out",
        BEGUN,
        "if any(site.merged for site in self.sites.values()):\n            "
        + LOSES
        + "\n            raise ValueError('unmerge first')\n        "
        + BEGUN,
    ),
    Bug("deleting_another_adapter_loses_the_merge", DELETED, DELETED + "\n        " + LOSES),
    Bug("deleting_another_adapter_keeps_the_merge", DELETED, DELETED + "\n        " + KEEPS),
    Bug(
        "a_merged_adapter_is_saved_as_zero",
        "A, B = a.A, a.B\n                if a.moved",
        "A, B = a.A, a.B * (not site.merged)\n                if a.moved",
    ),
    Bug(
        "saving_loses_the_merge",
        "c = self.converted(adapter) | ",
        LOSES + "\n            c = self.converted(adapter) | ",
    ),
    Bug("the_second_merge_forgets_the_first", EVERY, EVERY.replace("everything", "new")),
    Bug(
        "writing_another_adapter_changes_the_merge",
        WRITE,
        WRITE
        + "\n        if self.merged and name not in self.merged:\n            self.held = self.held + self.delta(adapter)",
    ),
    Bug(
        "writing_another_adapter_keeps_the_merge",
        WRITE,
        WRITE + "\n        if self.merged and name not in self.merged:\n            self.W = self.held",
    ),
    Bug("combining_loses_the_merge", COMBINED, LOSES + "\n        " + COMBINED),
    Bug("combining_keeps_the_merge", COMBINED, KEEPS + "\n        " + COMBINED),
    Bug(
        "switching_on_loses_the_merge",
        "self.enabled = enabled\n        for site",
        "self.enabled = enabled\n        " + LOSES + "\n        for site",
    ),
    Bug("training_mode_loses_the_merge", "self.mode = mode", "self.mode = mode\n        " + LOSES),
    Bug("setting_another_adapter_keeps_the_merge", SET, KEEPS + "\n        " + SET),
)
