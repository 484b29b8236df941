"""Faults in what is saved whole and what is excluded."""

from __future__ import annotations

from .bug import Bug

NAMED = '        if any(ends(".".join(p[: i + 1]), c["modules_to_save"] or []) for i in range(len(p)))\n    ]'
BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
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
