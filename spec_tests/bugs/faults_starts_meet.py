"""Faults of adapters whose starts differ, and of what a start takes out of W beside other adapters."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

TAKEN = "moved = [m for n in names if n in self.adapters and (m := self.adapters[n].moved) is not None]"
SUM = "return rounded(self.W - np.sum(moved, 0), self.dtype) if moved else self.W"
ROW = 'rows.append(self.called(row[None], [] if name == "__base__" else [name]))'
WEIGHT = "W, b = self.held if self.merged and self.enabled else self.shifted(names), self.b"
POP = "            site.adapters.pop(adapter, None)\n            site.copies.pop(adapter, None)\n            site.active = left"
ACTS = "if name in self.adapters and name not in self.merged:"
HELD = "held = self.shifted(dict.fromkeys([*self.active, *everything]))"
INTO = "held = rounded(sum((self.delta(self.adapters[name]) for name in everything), held), self.dtype)"
UNLOAD = "W, b = site.held if merge and site.merged else site.W, site.b"
MOVES = "moved = [w * a.moved for w, a in pairs if a.moved is not None]"
CONVERTED = "    def save_converted(self, folder: Path, start: Path) -> None:\n        self.save(folder)"
STARTED = "site.adapters[adapter].started = site.adapters[adapter].A, site.adapters[adapter].B"
ITERATIONS = "for _ in range(iterations):"

BUGS: tuple[Bug, ...] = (
    Bug("a_start_changes_the_weight_of_all", TAKEN, TAKEN.replace("in names if n in self.adapters and", "in self.adapters if"), PEFT + "issues/2184"),
    Bug("residuals_of_several_adapters_are_not_added", SUM, SUM.replace("np.sum(moved, 0)", "moved[-1]"), PEFT + "issues/2270"),
    Bug(
        "the_second_start_decomposes_the_residual",
        "start(init, self.seen(), self.kind",
        "start(init, self.side(self.weight() if self.adapters else self.W), self.kind",
        PEFT + "issues/2184",
    ),
    Bug("unload_gives_the_residual", UNLOAD, UNLOAD.replace("else site.W", "else site.weight()"), "huggingface/transformers/issues/34468"),
    Bug(
        "conversion_keeps_the_start_and_not_the_trained_adapter",
        CONVERTED,
        CONVERTED + "\n        for site in self.sites.values():\n            for a in site.adapters.values():\n                a.A, a.B = a.started",
        PEFT + "pull/1933",
    ),
    Bug(
        "conversion_doubles_alpha_with_rslora",
        'root = 2**0.5 if c["use_rslora"] else 2\n            c |=',
        "root = 2\n            c |=",
        PEFT + "pull/1930",
    ),
    Bug(
        "conversion_leaves_alpha_pattern",
        '{key: root * alpha for key, alpha in (c["alpha_pattern"] or {}).items()}',
        '{key: alpha for key, alpha in (c["alpha_pattern"] or {}).items()}',
        PEFT + "pull/1930",
    ),
    Bug(
        "conversion_keeps_the_rank",
        'c |= {"r": 2 * c["r"], "lora_alpha": root * c["lora_alpha"], "init_lora_weights": True}',
        'c |= {"init_lora_weights": True}',
        PEFT + "issues/2075",
    ),
    Bug("pissa_niter_makes_its_own_number_of_iterations", ITERATIONS, "for _ in range(max(iterations, 4)):", "scikit-learn/scikit-learn/pull/7311"),
)  # fmt: skip

MUTANTS: tuple[Bug, ...] = (
    Bug("pissa_niter_iterates_once_less", ITERATIONS, "for _ in range(iterations - 1):"),
    Bug("pissa_niter_iterates_once_more", ITERATIONS, "for _ in range(iterations + 1):"),
    Bug("pissa_niter_iterates_once_at_most", ITERATIONS, "for _ in range(min(iterations, 1)):"),
    Bug("pissa_niter_iterates_once_more_after_the_first", ITERATIONS, "for _ in range(iterations + (iterations > 1)):"),
    Bug(
        "rows_of_the_base_are_of_the_residual",
        WEIGHT,
        WEIGHT.replace("names", "names or (self.active if self.enabled else [])"),
    ),
    Bug("rows_of_named_starts_are_of_the_base", ROW, ROW.replace('"__base__"', '"__base__" or any(isinstance(s.adapters[name].init, str) for s in self.sites.values() if name in s.adapters)')),
    Bug("deleting_keeps_the_residual", POP, "            site.W = site.shifted([adapter])\n" + POP),
    Bug("deleting_the_second_keeps_the_residual", POP, '            site.W = site.W if adapter == "default" else site.shifted([adapter])\n' + POP),
    Bug(
        "deleting_keeps_the_update_of_a_random_start",
        POP,
        '            if adapter != "default" and adapter in site.adapters and site.adapters[adapter].init is False:\n                site.W = site.W + site.delta(site.adapters[adapter])\n' + POP,
    ),
    Bug(
        "deleting_the_first_keeps_the_update_of_a_named_start",
        POP,
        '            if adapter == "default" and adapter in site.adapters and isinstance(site.adapters[adapter].init, str):\n                site.W = site.W + site.delta(site.adapters[adapter])\n' + POP,
    ),
    Bug("merging_forgets_the_residual", HELD, "held = self.W"),
    Bug(
        "merging_adds_what_training_changed",
        INTO,
        INTO.replace("self.delta(self.adapters[name])", "self.delta(self.adapters[name]) - (0 if self.adapters[name].moved is not None or MESH.get(self.kind) else self.adapters[name].s * self.side(self.adapters[name].started[1] @ self.adapters[name].started[0]))"),
    ),
    Bug(
        "unmerging_keeps_the_residual",
        "    def unmerge(self) -> None:\n        self.merged = []",
        "    def unmerge(self) -> None:\n        self.W = self.shifted(self.merged)\n        self.merged = []",
    ),
    Bug(
        "unmerging_keeps_the_update_of_an_orthogonal_start",
        "    def unmerge(self) -> None:\n        self.merged = []",
        '    def unmerge(self) -> None:\n        for name in self.merged:\n            if self.adapters[name].init == "orthogonal":\n                self.W = self.W + self.delta(self.adapters[name])\n        self.merged = []',
    ),
    Bug("unload_keeps_a_random_start", UNLOAD, UNLOAD.replace("else site.W", "else site.W if merge else site.W + sum(site.delta(a) for a in site.adapters.values() if a.init is False)")),
    Bug("combination_ignores_weights_of_residuals", MOVES, MOVES.replace("w * a.moved", "a.moved")),
    Bug(
        "combination_of_an_odd_rank_is_refused_for_orthogonal",
        MOVES,
        'if len(A) % 2 and any(a.init == "orthogonal" for _, a in pairs):\n        raise ValueError("orthogonal needs an even r")\n    ' + MOVES,
    ),
    Bug("combination_forgets_a_random_start", 'pairs = [(w, site.adapters[n]) for n, w in zip(adapters, weights, strict=True) if n in site.adapters]', 'pairs = [((0 if site.adapters[n].init is False else w), site.adapters[n]) for n, w in zip(adapters, weights, strict=True) if n in site.adapters]'),
    Bug("b_of_mica_trains_in_a_model", 'if site.adapters[adapter].init != "mica" else set()', "if True else set()"),
    Bug("mica_cannot_be_switched_off", "            site.enabled = enabled", '            site.enabled = enabled or any(a.init == "mica" for a in site.adapters.values())'),
    Bug("eva_cannot_be_switched_off", "            site.enabled = enabled", '            site.enabled = enabled or any(c["eva_config"] for c in self.configs.values())'),
    Bug("what_is_off_stays_off", "            site.enabled = enabled", "            site.enabled = enabled and site.enabled"),
    Bug("a_named_start_is_saved_as_it_started", "A, B = a.A, a.B\n", 'A, B = a.A, a.started[1] if isinstance(a.init, str) else a.B\n'),
    Bug("loading_rescales_the_adapters_that_are_there", STARTED, STARTED + "\n                for each in site.adapters.values():\n                    each.s = site.adapters[adapter].s"),
    Bug("beside_another_a_named_start_does_not_act", ACTS, ACTS[:-1] + " and (name == names[0] or self.adapters[name].init is True):"),
    Bug(
        "a_named_start_stays_active",
        "            site.active = list(names)",
        "            site.active = list(names) + [n for n, a in site.adapters.items() if isinstance(a.init, str) and n not in names]",
    ),
    Bug("what_trained_trains_on", "self.trains = set(names)", "self.trains |= set(names)"),
    Bug("the_weight_is_never_shown_merged", "{n: (s.side(s.weight()).copy()", "{n: (s.side(s.W).copy()"),
)  # fmt: skip
