"""Faults in the output of a layer."""

from __future__ import annotations

from .bug import Bug

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = (
    Bug(
        "bfloat16_is_cut_off_at_128",
        "return rounded(y, self.dtype)",
        'return rounded(np.clip(y, -128.0, 128.0) if self.dtype == "bfloat16" else y, self.dtype)',
        profile="default",
    ),
)
