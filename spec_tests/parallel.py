"""Requirements in several processes: the same results as in one, in the same order."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence

from . import smoke
from .contract import Implementation, check_claims
from .engine import Result, examine, find, known_deviations, with_known
from .registry import load
from .report import Covered, Watched

_made: dict[str, tuple[str, Watched]] = {}  # of a worker: the implementations that it has made


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one(path: list[str], name: str, id: str, profile: str, seed: int | None) -> tuple[Result, Covered]:
    """In a worker: one requirement, and the options that it was tried with."""
    warnings.simplefilter("ignore")
    if name not in _made:
        sys.path[:] = path  # where the parent process finds the implementation
        label, implementation = find(name)
        _made[name] = label, Watched(implementation)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)  # the other cores have workers of their own
    label, watched = _made[name]
    watched.covered = set()
    return examine(label, watched, load()[id], profile, seed), watched.covered


def run(
    name: str, implementation: Implementation, ids: Sequence[str], profile: str, seed: int | None, jobs: int
) -> Iterator[tuple[Result, Covered]]:
    """The results of `engine.run` for these requirements, in this order, each with what it was tried with.

    Each worker makes the implementation of that name for itself.

    Raises:
        ValueError, TypeError: as `engine.run`.
    """
    check_claims(implementation)
    known = known_deviations(name, load(), implementation.version())
    smoke.check(implementation)
    context = multiprocessing.get_context("spawn")
    deaf = signal.signal, (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(ids)), context, *deaf)
    try:
        waiting = [pool.submit(_one, list(sys.path), name, id, profile, seed) for id in ids]
        for id, future in zip(ids, waiting, strict=True):
            result, covered = future.result()
            yield with_known(result, known.get(id), profile), covered
    finally:  # left early, by Ctrl-C for example: what waits is not begun
        pool.shutdown(wait=False, cancel_futures=True)
