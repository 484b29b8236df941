"""PyTorch's own engines on an adapted model: the same losses and the same adapter as in one process.

Two processes with gloo, started by torchrun; see tests/distributed/worker.py for what they do, in float64.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spec_tests import agree

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).parent / "worker.py"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def ran(folder: Path, way: str, start: str, processes: int) -> dict[str, Any]:
    """What the ranks have left, and the adapter that was saved."""
    line = [sys.executable, *(TORCHRUN if processes > 1 else []), str(WORKER), way, str(folder), start]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    return {"ranks": ranks, "tensors": load_file(folder / "adapter" / "adapter_model.safetensors"), "config": config}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {start: ran(tmp_path_factory.mktemp(start), "one", start, 1) for start in ("default", "pissa")}


WAYS = ["ddp", "ddp+checkpointing", "fsdp", "fsdp+checkpointing", "fsdp+dcp", "hsdp", "tp"]


@pytest.mark.parametrize("way, start", [*((way, "default") for way in WAYS), ("ddp", "pissa"), ("fsdp", "pissa")])
def test_two_processes_train_and_save_what_one_does(way: str, start: str, alone: dict, tmp_path: Path) -> None:
    alone, together = alone[start], ran(tmp_path, way, start, 2)
    one, world = alone["ranks"][0], len(together["ranks"])
    for rank in together["ranks"]:
        agree(rank["losses"], one["losses"])
    assert together["config"] == alone["config"]
    agree(together["tensors"], alone["tensors"])
    held = [rank["bytes"] for rank in together["ranks"]]
    if way.startswith("fsdp"):  # base weights and factors alike are cut: each rank holds its share of the bytes
        assert held == [one["bytes"] / world] * world
    elif way != "tp":
        assert held == [one["bytes"]] * world


def test_what_would_put_other_weights_into_a_sharded_model_is_refused(tmp_path: Path) -> None:
    refusals = ran(tmp_path, "fsdp", "default", 2)["ranks"][0]["refusals"]
    assert sorted(refusals) == ["add", "delete", "merge", "merge_and_unload", "unload"]
    for said in refusals.values():
        assert "not possible once the model is sharded" in said


def test_the_demo_runs_under_torchrun_and_finds_what_it_finds_alone(tmp_path: Path) -> None:
    accuracies = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        code = "import os; from lora_ref.tools.cli import main; os._exit(main())"  # without gloo's threads at the end
        demo = [sys.executable, "-c", code, "demo", "--quick", "--out", str(out)]
        line = [sys.executable, *TORCHRUN, "--no-python", *demo] if processes > 1 else demo
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Written to") == 1  # one speaks for all
        accuracies += [run["rotated_after"] for run in json.loads((out / "results.json").read_text())["runs"]]
    half = len(accuracies) // 2
    assert accuracies[half:] == pytest.approx(accuracies[:half], abs=0.02)
