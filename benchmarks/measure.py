"""How cost is measured: by turns in one process, as ratios; and bytes by counting, not by sampling.

ratio     of two jobs that ran in the same turn; of all turns the median, and the quartiles as spread
saved     bytes of the tensors that autograd keeps for the backward pass, each storage once, without
          those that stay alive anyway (parameters, the input)
peak      the most bytes that tensors made by the job held at one moment
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

Job = Callable[[], Any]
Prepare = Callable[[], Job]


@dataclass
class Bar:
    """One thing that must hold of a case: `value` of its row is at most `at_most`; `floor`: no code can do better."""

    text: str
    value: Callable[[dict[str, Any]], float]
    at_most: float
    floor: Callable[[dict[str, Any]], float] | None = None


@dataclass
class Case:
    """Jobs to be compared. `prepare` functions return the job to be timed; what they do is not timed.

    Args:
        theme: the table that the case belongs to.
        about: what the case is, as the table's first columns.
        jobs: {name: prepare}; ratios are of a job's time over that of `floor`, one of the names.
        fresh: prepare anew before each turn, for jobs that change what they work on.
        waits: for jobs that wait for a disk: measure the time on the clock, not the process's own.
        least: so many turns at least, however long they take.
        bytes: also measure `saved` and `peak` of each job; `alive(job)` gives the tensors not counted.
        computed: {name: ratio} that are possible at best, from FLOPs, bytes and the seconds that `floor` takes.
        bars: what must hold.
    """

    theme: str
    about: dict[str, Any]
    jobs: Mapping[str, Prepare]
    floor: str
    fresh: bool = False
    waits: bool = False
    least: int = 5
    bytes: bool = False
    alive: Callable[[Job], Iterable[Tensor]] = lambda job: ()
    computed: Callable[[float], dict[str, float]] = lambda seconds: {}
    bars: list[Bar] = field(default_factory=list)


def run(case: Case, seconds: float, turns: int, device: str = "cpu") -> dict[str, Any]:
    """Measure a case: its row of the results."""
    gc.collect()
    gc.freeze()  # the libraries' own objects: collecting before each job is then quick
    row: dict[str, Any] = {"theme": case.theme, "about": case.about, "floor": case.floor}
    try:
        jobs = {name: prepare() for name, prepare in case.jobs.items()}
        if case.bytes:  # a job's first call is slower than the others, and not timed
            counted = {name: bytes_of(job, case.alive(job), device) for name, job in jobs.items()}
            row["saved"], row["peak"] = ({name: pair[i] for name, pair in counted.items()} for i in (0, 1))
        else:
            for job in jobs.values():
                job()
        times = by_turns(case, jobs, seconds, turns, device)
    finally:
        gc.unfreeze()
    row["turns"] = len(times[case.floor])
    row["ratios"] = {name: spread(t / f for t, f in zip(times[name], times[case.floor], strict=True)) for name in times}
    row["computed"] = case.computed(statistics.median(times[case.floor]))
    row["bars"] = []
    for bar in case.bars:
        value = bar.value(row)
        floor = {"floor": bar.floor(row)} if bar.floor else {}
        row["bars"].append(
            {"text": bar.text, "value": value, "at_most": bar.at_most, "kept": value <= bar.at_most} | floor
        )
    return row


def by_turns(case: Case, jobs: Mapping[str, Job], seconds: float, turns: int, device: str) -> dict[str, list[float]]:
    """Seconds of each job in each turn, in an order drawn anew each turn: at least `case.least`, at most `turns`, and
    none begun after `seconds`. A job of less than 2 ms is called several times a turn; `jobs` have run once."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    calls: dict[str, int] = {}
    order, shuffle, began = list(jobs), random.Random(0), time.perf_counter()
    while (done := len(times[case.floor])) < min(case.least, turns) or (
        done < turns and time.perf_counter() - began < seconds
    ):
        shuffle.shuffle(order)
        for name in order:
            job = case.jobs[name]() if case.fresh else jobs[name]
            times[name].append(time_of(job, calls.get(name, 1), device, case.waits))
            del job
        if not calls:  # after the first turn
            calls = {name: 1 if case.fresh else max(1, min(200, round(0.002 / t))) for name, (t,) in times.items()}
            if max(calls.values()) > 1:  # that turn is not like the others
                times = {name: [] for name in jobs}
    return times


def time_of(job: Job, calls: int, device: str, waits: bool = False) -> float:
    """Seconds a call."""
    # with one thread its own time, which other programs on the machine do not lengthen
    own = device == "cpu" and torch.get_num_threads() == 1 and not waits
    clock = time.process_time if own else time.perf_counter
    gc.collect()
    gc.disable()
    try:
        synchronize(device)
        began = clock()
        for _ in range(calls):
            job()
        synchronize(device)
        return (clock() - began) / calls
    finally:
        gc.enable()


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def spread(values: Iterable[float]) -> dict[str, float]:
    """The median and the quartiles.

    >>> spread([1.0, 2.0, 3.0, 4.0, 9.0])
    {'median': 3.0, 'low': 2.0, 'high': 4.0}
    """
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def bytes_of(job: Job, alive: Iterable[Tensor], device: str) -> tuple[int, int]:
    """One call's `saved` (beyond the tensors `alive`) and `peak`."""
    known, found = {storage(t) for t in alive}, {}

    def pack(tensor: Tensor) -> Tensor:
        found[storage(tensor)] = tensor.untyped_storage().nbytes()  # until the backward pass autograd keeps it alive
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        peak = peak_bytes(job, device)
    return sum(n for where, n in found.items() if where not in known), peak


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_bytes(job: Job, device: str) -> int:
    """The most bytes that tensors made by the job held at one moment."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        job()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
