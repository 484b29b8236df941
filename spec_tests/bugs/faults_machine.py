"""Faults that show after a sequence of operations."""

from __future__ import annotations

from .bug import Bug

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "the_base_is_shown_merged_after_unmerging",
        "return {n: (s.side(s.weight()).copy(),",
        "return {n: (s.side(s.weight() if s.held is s.W else s.held).copy(),",
        profile="default",
    ),
)
