"""Faults about contexts, and about training and evaluation."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

OFF = "before = self.enabled\n        self.enable(False)\n        try:\n            yield\n        finally:\n            self.enable(before)"
SCALES = "a.s = a.s * factor\n            yield"
UNSCALES = "for a, s in zip(acting, before, strict=True):\n                a.s = s"
MERGED = 'raise ValueError("the scaling of a merged adapter cannot change: unmerge first")'
MODE = "train = self.mode if train is None else train"
MERGES = "names = self.active() if adapters is None else self.known(adapters)"


def left(last: str) -> str:
    """The context with another end."""
    return OFF.replace("self.enable(before)", last)


BUGS: tuple[Bug, ...] = (
    Bug("a_context_always_ends_switched_on", OFF, left("self.enable(True)"), PEFT + "issues/3507"),
    Bug(
        "an_exception_leaves_the_adapter_off",
        OFF,
        "before = self.enabled\n        self.enable(False)\n        yield\n        self.enable(before)",
        PEFT + "issues/367",
    ),
    Bug(
        "a_context_leaves_everything_frozen",
        OFF,
        left("self.enable(before)\n            self.trains = set()"),
        PEFT + "issues/3447",
    ),
    Bug(
        "a_context_makes_a_loaded_adapter_train",
        OFF,
        left("self.enable(before)\n            self.trains = set(self.active())"),
        PEFT + "issues/3447",
    ),
    Bug(
        "an_adapter_added_in_evaluation_drops",
        MODE,
        "train = self.mode or len(self.configs) > 1 if train is None else train",
        PEFT + "issues/3753",
    ),
    Bug(
        "adding_an_adapter_begins_to_train",
        "self.configs[adapter] = c\n\n    def known",
        "self.configs[adapter] = c\n        self.mode = True\n\n    def known",
        "huggingface/transformers/issues/34469",
    ),
    Bug(
        "combining_forgets_the_scaling_of_now",
        "A, B = np.concatenate([w * a.s * a.A for w, a in pairs])",
        "A, B = np.concatenate([w * a.first_s * a.A for w, a in pairs])",
        "huggingface/diffusers/issues/5414",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug("a_context_switches_nothing_off", OFF, OFF.replace("self.enable(False)", "pass")),
    Bug("a_context_ends_switched_off", OFF, left("self.enable(False)")),
    Bug("an_inner_context_switches_on", OFF, OFF.replace("self.enable(False)", "self.enable(not before)")),
    Bug(
        "an_inner_context_forgets_the_outer",
        OFF,
        OFF.replace("before = self.enabled", "self.was = self.enabled").replace("enable(before)", "enable(self.was)"),
    ),
    Bug(
        "a_context_sets_the_first_adapter",
        OFF,
        left(
            'self.enable(before)\n            trains = self.trains\n            self.set(["default"])\n            self.trains = trains'
        ),
    ),
    Bug(
        "a_context_ends_with_one_adapter",
        OFF,
        left(
            "self.enable(before)\n            for site in self.sites.values():\n                site.active = site.active[:1]"
        ),
    ),
    Bug(
        "with_two_adapters_the_second_stays_on",
        OFF,
        OFF.replace(
            "self.enable(False)",
            "self.enable(False)\n        for site in self.sites.values():\n            site.enabled = len(site.active) > 1",
        ),
    ),
    Bug(
        "a_merged_model_stays_on_in_a_context",
        OFF,
        OFF.replace("self.enable(False)", "self.enable(any(site.merged for site in self.sites.values()))"),
    ),
    Bug(
        "a_merged_model_is_off_after_a_context",
        OFF,
        left("self.enable(before and not any(site.merged for site in self.sites.values()))"),
    ),
    Bug("inside_a_context_the_factor_is_squared", SCALES, SCALES.replace("a.s * factor", "a.s * factor**2")),
    Bug("an_inner_factor_starts_anew", SCALES, SCALES.replace("a.s * factor", "a.first_s * factor")),
    Bug("an_inner_context_of_scaling_resets", UNSCALES, UNSCALES.replace("a.s = s", "a.s = a.first_s")),
    Bug(
        "a_context_of_scaling_is_not_undone", UNSCALES, UNSCALES.replace("a.s = s", "a.s = a.s if factor == 0.5 else s")
    ),
    Bug("a_factor_of_0_stays", UNSCALES, UNSCALES.replace("a.s = s", "a.s = s if factor else a.s")),
    Bug(
        "scaling_a_merged_model_changes_its_base",
        MERGED,
        "[setattr(site, 'W', site.held) for site in self.sites.values()]",
    ),
    Bug("nothing_drops_until_a_pass_says_so", MODE, "train = False if train is None else train"),
    Bug(
        "a_context_changes_the_mode_inside",
        OFF,
        OFF.replace("self.enable(False)", "self.enable(False)\n        mode, self.mode = self.mode, False").replace(
            "self.enable(before)", "self.enable(before)\n            self.mode = mode"
        ),
    ),
    Bug("a_context_ends_in_evaluation", OFF, left("self.enable(before)\n            self.mode = False")),
    Bug(
        "merging_in_training_merges_half",
        MERGES,
        MERGES
        + "\n        for a in (a for site in self.sites.values() for a in site.adapters.values() if self.mode and a.dropout):\n            a.B = a.B * a.dropout",
    ),
    Bug("merging_ends_the_training", MERGES, MERGES + "\n        self.mode = False"),
    Bug(
        "setting_an_adapter_switches_on",
        "site.active = list(names)",
        "site.active, site.enabled = list(names), True",
    ),
    Bug(
        "what_was_active_before_a_context_is_added_after_it",
        OFF,
        left(
            "self.enable(before)\n            for site in self.sites.values():\n                site.active = list(dict.fromkeys([*kept, *site.active]))"
        ).replace("before = self.enabled", "before, kept = self.enabled, self.active()"),
    ),
    Bug(
        "inside_a_context_all_trains",
        "for adapter in self.trains if self.enabled else ():",
        "for adapter in self.trains if self.enabled else self.configs:",
    ),
    Bug(
        "a_context_of_scaling_sets_the_first_adapter",
        UNSCALES,
        "for site in self.sites.values():\n                site.active = ['default']\n            " + UNSCALES,
    ),
    Bug("a_context_of_scaling_freezes_all", UNSCALES, "self.trains = set()\n            " + UNSCALES),
    Bug(
        "an_exception_in_a_context_freezes_all",
        OFF,
        OFF.replace(
            "finally:", "except BaseException:\n            self.trains = set()\n            raise\n        finally:"
        ),
    ),
    Bug(
        "an_exception_in_a_context_ends_the_training",
        OFF,
        OFF.replace(
            "finally:", "except BaseException:\n            self.mode = False\n            raise\n        finally:"
        ),
    ),
    Bug(
        "a_context_of_scaling_forgets_what_was_added",
        UNSCALES,
        "for site in self.sites.values():\n                site.adapters = {n: a for n, a in site.adapters.items() if any(a is b for b in acting)}\n            "
        + UNSCALES,
    ),
    Bug(
        "a_context_of_scaling_divides_what_was_added",
        UNSCALES,
        "for a in (a for site in self.sites.values() for a in site.adapters.values()):\n                a.s = a.s / factor if factor else a.s\n            "
        + UNSCALES,
    ),
)
