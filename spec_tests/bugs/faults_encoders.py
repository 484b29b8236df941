"""Faults of TransformerEncoderLayer."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

FIRST = 'self.sites[f"{encoder}.linear1"].forward(h, names, rng)'
SECOND = 'self.sites[f"{encoder}.linear2"].forward(inner, names, rng)'
BEGIN = "h = rounded(normalised(2 * x), self.dtype)"

BUGS: tuple[Bug, ...] = (
    Bug(
        "the_fast_path_of_an_encoder_reads_the_base_weights",
        BEGIN,
        BEGIN + "\n        names = names if rng is not None else []",
        "pytorch/pytorch/issues/82919",
    ),
    Bug(
        "the_fast_path_is_left_for_inference",
        BEGIN,
        BEGIN + "\n        names = names if rng is not None or not self.trains else []",
        "pytorch/pytorch/issues/128413",
    ),
    Bug(
        "a_merged_encoder_adds_its_update_twice",
        SECOND,
        f"sum((s.branch(inner, s.adapters[n], None) for s in [self.sites[f'{{encoder}}.linear2']] for n in s.merged), {SECOND})",
        PEFT + "pull/3774",
    ),
)
MUTANTS: tuple[Bug, ...] = (
    Bug("an_encoder_in_training_has_no_adapter", BEGIN, BEGIN + "\n        names = names if rng is None else []"),
    Bug("an_encoder_in_a_batch_has_the_active_adapter", BEGIN, BEGIN + "\n        names = None"),
    Bug(
        "an_encoder_is_not_switched_off",
        FIRST,
        FIRST.replace("names", 'self.sites[f"{encoder}.linear1"].active if names is None else names'),
    ),
    Bug(
        "an_encoder_is_unloaded_without_its_updates",
        "W, b = site.held if merge and site.merged else site.W, site.b",
        "W, b = site.held if merge and site.merged and not self.encoders else site.W, site.b",
    ),
    Bug(
        "the_second_layer_of_an_encoder_is_not_loaded",
        "site.write(adapter, A, B.reshape(B.shape[:2]))",
        'site.write(adapter, A, B.reshape(B.shape[:2]) * (not name.endswith(".linear2")))',
    ),
)
