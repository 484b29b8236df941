"""The machine that was measured: what it is, which precisions it computes in, how fast its memory is."""

import ctypes
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lora_ref

from .measure import synchronize


def describe(options: Any) -> dict[str, Any]:
    """Processor, threads, BLAS and versions; nothing that names the machine."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    blas = re.search(r"Math Kernel Library Version ([\w.]+)|OpenBLAS ([\w.]+)", torch.__config__.show())
    return {
        "device": torch.cuda.get_device_name() if options.cuda else "CPU",
        "cpu": model.group(1) if model else platform.processor(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "allocator": options.allocator,
        "blas": blas.group(0) if blas else "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": version("peft"),
        "loralib": version("loralib"),
        "transformers": version("transformers"),
        "lora_ref": lora_ref.__version__,
    }


def dtypes(options: Any) -> list[torch.dtype]:
    """float32, and bfloat16 where the machine computes in it; on CUDA bfloat16 alone."""
    if options.cuda:
        return [torch.bfloat16]
    can = torch.cpu.get_capabilities()
    has = can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16")
    return [torch.float32, torch.bfloat16] if has and not options.quick else [torch.float32]


def bandwidth(options: Any) -> float:
    """Bytes a second that a copy reads and writes: the best of five, of 64 MiB."""
    source = torch.zeros(2**24, device=options.device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        synchronize(options.device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(options.device)
        best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
    return best


def can_keep_freed_memory() -> bool:
    """Is the allocator glibc's?"""
    return hasattr(ctypes.CDLL(None), "mallopt")


def keep_freed_memory() -> None:
    """Let glibc keep the memory that is freed, as CUDA's allocator does; for the rest of this process.

    Otherwise each large tensor costs page faults, or none, by where it happens to lie: most of the noise of a step.
    """
    trim_threshold, mmap_max = -1, -4  # names of the two settings in malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1)):
        raise OSError("glibc refuses to keep freed memory: measure with --trim")
