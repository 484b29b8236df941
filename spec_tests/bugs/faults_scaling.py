"""Faults that the requirements of areas/scaling.py find."""

from __future__ import annotations

from .bug import Bug

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "models_take_r_for_lora_alpha",
        "made = {n: self.sites[n].add(adapter, r, alpha, c, options, self.rng) for n, (r, alpha) in found.items()}",
        "made = {n: self.sites[n].add(adapter, r, r, c, options, self.rng) for n, (r, alpha) in found.items()}",
    ),
)
