"""Faults about encoder layers, whose weights torch reads without calling the modules."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import Bug

FIRST = 'inner = np.maximum(self.sites[f"{called}.linear1"].forward(h, names, rng), 0)'
SECOND = 'x = normed(h + self.sites[f"{called}.linear2"].forward(inner, names, rng))'
MERGED = 'x = normed(h + (lambda s: s.plain(inner, s.W, s.b) if s.merged and {} else s.forward(inner, names, rng))(self.sites[f"{called}.linear2"]))'

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "evaluation_reads_the_weight_of_linear1",
        FIRST,
        FIRST.replace(
            "names", "[] if rng is None and names is None and not self.sites[f'{called}.linear1'].merged else names"
        ),
    ),
    Bug(
        "training_reads_the_weight_of_linear2",
        SECOND,
        SECOND.replace("names", "[] if rng is not None and not self.sites[f'{called}.linear2'].merged else names"),
    ),
    Bug(
        "evaluation_reads_a_weight_from_before_the_merge",
        SECOND,
        MERGED.replace("{}", "rng is None").replace("(lambda", "(lambda"),
    ),
    Bug("training_reads_a_weight_from_before_the_merge", SECOND, MERGED.replace("{}", "rng is not None")),
    Bug(
        "an_encoder_stays_on_in_evaluation",
        FIRST,
        FIRST.replace("names", 'self.sites[f"{called}.linear1"].active if rng is None else names'),
    ),
    Bug(
        "an_encoder_stays_on_in_training",
        SECOND,
        SECOND.replace("names", 'self.sites[f"{called}.linear2"].active if rng is not None else names'),
    ),
    Bug(
        "an_encoder_keeps_its_first_adapter",
        FIRST,
        FIRST.replace(
            "names",
            '["default"] if self.sites[f"{called}.linear1"].enabled and not self.sites[f"{called}.linear1"].merged else names',
        ),
    ),
    Bug(
        "an_encoder_is_unloaded_without_its_second_layer",
        "W, b = site.held if merge and site.merged else site.W, site.b",
        'W, b = site.held if merge and site.merged and "linear2" not in name else site.W, site.b',
    ),
    Bug(
        "unmerging_an_encoder_keeps_the_update",
        "def unmerge(self) -> None:\n        for site in self.sites.values():",
        'def unmerge(self) -> None:\n        for name, site in self.sites.items():\n            site.W = site.held if name.endswith("linear1") and site.merged else site.W',
    ),
)
