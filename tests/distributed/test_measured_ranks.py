"""What ranks hold is what `lora_ref.tools.plan` says, measured anew for two engines; the report is complete."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from lora_ref.tools.plan import ENGINES, SHAPES, Shape, memory
from spec_tests.rounding import ROUNDINGS, UNIT

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import measure  # noqa: E402


def check(row: dict, engine: str) -> None:
    found, planned = row["measured"], row["planned"]
    assert planned == memory(measure.SHAPE, measure.RANK, engine, row["processes"], row["tokens"])
    for key in ("weights", "adapters"):  # norms are not cut by tensor parallelism, and Adam counts its steps
        assert found[key] == pytest.approx(planned[key], rel=2e-3)
    if planned["gathered"]:
        assert 0.5 * planned["gathered"] < found["gathered"] <= planned["gathered"]
    else:
        assert found["gathered"] == 0
    assert 0.5 * planned["activations"] < found["activations"] <= planned["activations"]
    assert found["peak"] == pytest.approx(planned["total"], rel=0.1)


def test_two_engines_hold_what_is_planned(tmp_path: Path) -> None:
    rows = measure.bytes_of_ranks(tmp_path, ("DDP", "FSDP2"))
    for engine, row in rows.items():
        check(row, engine)
    ddp, fsdp = (rows[engine]["measured"] for engine in ("DDP", "FSDP2"))
    assert fsdp["weights"] * 2 == ddp["weights"] and fsdp["activations"] == ddp["activations"]
    assert fsdp["peak"] < ddp["peak"]


def test_the_committed_figures_are_of_all_engines_and_ways() -> None:
    results = json.loads(measure.RESULTS.read_text(encoding="utf-8"))
    assert results["shape"] == vars(measure.SHAPE) | {"r": measure.RANK}
    assert tuple(results["memory"]) == ENGINES
    for engine, row in results["memory"].items():
        check(row, engine)
    import huggingface
    import test_distributed

    assert measure.WAYS == test_distributed.WAYS
    assert list(results["exactness"]) == [*measure.WAYS, *huggingface.WAYS]
    for way, differences in results["exactness"].items():
        # losses are below 5, an adapter's numbers below 1; Trainer's log takes four roundings in float32
        log = 8 * UNIT["float32"] if way.startswith("trainer") else ROUNDINGS * UNIT["float64"]
        assert 0 < differences["loss"] <= 5 * log
        assert 0 < differences["tensor"] <= ROUNDINGS * UNIT["float64"]


@pytest.mark.parametrize("size", SHAPES)
def test_a_block_and_the_larger_of_a_block_and_the_head_are_gathered(size: str) -> None:
    shape = SHAPES[size]
    larger = max(shape.block(), shape.vocab * shape.hidden)
    assert memory(shape, 16, "FSDP2", 8, 1)["gathered"] == 2 * (shape.block() + larger)
    small = Shape(2, 64, 160, 32, vocab=10)
    assert memory(small, 16, "FSDP2", 2, 1)["gathered"] == 2 * 2 * small.block()
