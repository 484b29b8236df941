"""Faults in what is saved whole and what is excluded."""

from __future__ import annotations

from .bug import Bug

NAMED = '        if any(ends(".".join(p[: i + 1]), c["modules_to_save"] or []) for i in range(len(p)))\n    ]'
KEPT = 'found |= {f"{place}.weight": W} | ({} if b is None else {f"{place}.bias": b})'
TWICE = """
                path, named_ = name.split("."), self.configs[adapter]["modules_to_save"]
                if sum(ends(".".join(path[: i + 1]), named_) for i in range(len(path))) > 1:
                    found[f"{place}.original_module.weight"] = W"""
OTHERS = 'if self.configs[adapter]["bias"] == "all":'
BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
    Bug("a_saved_module_inside_of_another_is_saved_twice", KEPT, KEPT + TWICE),
    Bug("only_parameters_called_bias_train_as_biases", OTHERS, OTHERS.replace('"all"', '"every"')),
    Bug("lora_only_trains_the_biases_of_attentions", OTHERS, OTHERS.replace('== "all"', '!= "none"')),
    Bug(
        "what_is_excluded_is_not_saved",
        NAMED,
        NAMED.replace("\n    ]", "\n        if not named(n, c['exclude_modules'])\n    ]"),
    ),
    Bug(
        "excluding_is_ignored_beside_saved_modules",
        'if named(name, c["exclude_modules"]) or name in keep:',
        'if (named(name, c["exclude_modules"]) and not keep) or name in keep:',
    ),
)
