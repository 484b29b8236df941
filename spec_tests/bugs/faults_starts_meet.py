"""Faults of adapters whose starts differ, and of what a start takes out of W beside other adapters."""

# ruff: noqa: E501 - a planted line is quoted whole

from __future__ import annotations

from .bug import PEFT, Bug

BUGS: tuple[Bug, ...] = ()
MUTANTS: tuple[Bug, ...] = ()
