"""transformers' Trainer and Accelerate on an adapted model: what a plain loop trains, in one process and in two.

The subclass and the hooks are those that page 15 of the book prints: see tests/distributed/huggingface.py. Networks and
training are float64, so that another order of sums shows in the last digits alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import peft
from transformers import Trainer

from lora_ref import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from spec_tests import agree, close, distance

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "distributed"))

import huggingface as hf  # noqa: E402

AdapterTrainer = hf.recipe("AdapterTrainer")["AdapterTrainer"]
RESUMES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture(autouse=True)
def accelerate_is_fresh() -> Iterator[None]:
    hf.fresh()
    yield
    hf.fresh()


@pytest.fixture(scope="module")
def plain() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    found = {}
    for kind in ("gpt2", "llama"):
        model = hf.adapted(kind)
        found[kind] = hf.plain(model), get_peft_model_state_dict(model)
    return found


def same_log(found: list[float], wanted: list[float]) -> None:
    """Trainer's log: it adds the losses of a step in float32, two at most here, and takes the mean of two processes."""
    close(found, wanted, terms=4, size=wanted, dtype="float32")


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=hf.batches()[0]["input_ids"]).logits


# -- one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_base_model_needs_no_special_argument(kind: str, plain: dict, tmp_path: Path) -> None:
    model = hf.adapted(kind)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    data = [row | {"note": torch.tensor(n)} for n, row in enumerate(hf.rows())]  # a column that is no input
    args = hf.arguments(tmp_path, eval_strategy="steps", eval_steps=hf.STEPS)
    trainer = Trainer(model.get_base_model(), args, train_dataset=data, eval_dataset=data)
    trainer.train()
    losses, adapter = plain[kind]
    same_log(hf.losses_of(trainer), losses)
    agree(get_peft_model_state_dict(model), adapter)
    assert losses[-1] < 0.9 * losses[0] and frozen
    for name, tensor in frozen.items():
        assert torch.equal(model.get_parameter(name), tensor), name
    assert math.isfinite(next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "options", [{"label_smoothing_factor": 0.2}, {"gradient_accumulation_steps": 2, "max_steps": 3}], ids=str
)
def test_the_losses_are_those_of_trainer_with_peft(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = hf.adapted(kind)
    model.save_pretrained(tmp_path)
    peer = peft.PeftModel.from_pretrained(hf.net_of(kind), tmp_path, is_trainable=True)
    found = []
    for net in (model.get_base_model(), peer):
        hf.fresh()
        trainer = Trainer(net, hf.arguments(tmp_path, **options), train_dataset=hf.rows())
        trainer.train()
        found.append(hf.losses_of(trainer))
    same_log(*found)
    agree(get_peft_model_state_dict(model), peft.get_peft_model_state_dict(peer))


def test_what_the_adapted_model_itself_needs(plain: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch received was empty"):
        Trainer(hf.adapted(), hf.arguments(tmp_path), train_dataset=hf.rows()).train()
    special = {"remove_unused_columns": False, "label_names": ["labels"]}
    model, smoothed = hf.adapted(), []
    trainer = Trainer(model, hf.arguments(tmp_path, **special), train_dataset=hf.rows())
    trainer.train()
    same_log(hf.losses_of(trainer), plain["llama"][0])
    agree(get_peft_model_state_dict(model), plain["llama"][1])
    assert "eval_loss" in trainer.evaluate(hf.rows(8))
    for given in (lambda model: model, PeftModel.get_base_model):
        args = hf.arguments(tmp_path, label_smoothing_factor=0.2, **special)
        trainer = Trainer(given(hf.adapted()), args, train_dataset=hf.rows())
        trainer.train()
        smoothed.append(hf.losses_of(trainer)[0])
    assert distance(*smoothed) > 1e-3
    args = hf.arguments(tmp_path, save_strategy="steps", save_steps=3, **special)
    with pytest.raises(RuntimeError, match="share memory"):
        Trainer(hf.adapted("gpt2"), args, train_dataset=hf.rows()).train()


def trained(folder: Path, options: dict[str, Any], resume: bool = False, kind: str = "llama", **given: Any) -> Any:
    hf.fresh()
    args = hf.arguments(folder, save_strategy="steps", save_steps=2, **given)
    trainer = AdapterTrainer(hf.adapted(kind, **options), args, train_dataset=hf.rows(), eval_dataset=hf.rows(16, 1))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


STARTS = {
    "default": {"modules_to_save": ["lm_head"], "bias": "lora_only"},
    "pissa": {"init_lora_weights": "pissa"},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
}


@pytest.mark.parametrize("start", STARTS)
def test_a_resumed_run_ends_bit_for_bit_where_one_that_was_not_stopped_does(start: str, tmp_path: Path) -> None:
    options = STARTS[start] | {"lora_dropout": 0.2}
    whole = trained(tmp_path / "whole", options)
    trained(tmp_path / "parts", options, max_steps=4)
    late = trained(tmp_path / "parts", options, resume=True)  # the newest checkpoint: two steps are left
    assert hf.losses_of(late) == hf.losses_of(whole)
    ends = get_peft_model_state_dict(whole.adapted)
    for key, tensor in get_peft_model_state_dict(late.adapted).items():
        assert torch.equal(tensor, ends[key]), key


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_checkpoints_hold_the_adapter_alone_and_peft_reads_them(kind: str, tmp_path: Path) -> None:
    model = trained(tmp_path, {}, kind=kind).adapted
    for step in (2, 4, 6):
        files = {path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert files == RESUMES | {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    peer = peft.PeftModel.from_pretrained(hf.net_of(kind), tmp_path / "checkpoint-6")
    agree(logits(model), logits(peer))


def test_the_best_model_is_there_at_the_end(tmp_path: Path) -> None:
    given = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    worse = {"metric_for_best_model": "loss", "greater_is_better": True}  # so that the best is not the last
    trainer = trained(tmp_path, {}, **given, **worse)
    seen = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = max(seen, key=lambda step: seen[step])
    assert sorted(seen) == [2, 4, 6] and best != 6
    agree(trainer.evaluate()["eval_loss"], seen[best])
    ends, kept = get_peft_model_state_dict(trainer.adapted), adapter_in(tmp_path / f"checkpoint-{best}")
    assert ends.keys() == kept.keys() and all(torch.equal(ends[key], tensor) for key, tensor in kept.items())


def adapter_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("start", STARTS)
def test_save_model_writes_an_adapter_for_the_original_base_model(start: str, tmp_path: Path) -> None:
    trainer = trained(tmp_path, STARTS[start])
    trainer.save_model()
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == RESUMES
    again = PeftModel.from_pretrained(hf.net_of("llama"), tmp_path)
    agree(logits(again), logits(trainer.adapted))


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, {})
    before = hf.adapted(r=2)
    with pytest.raises(ValueError, match="has shape"):
        set_peft_model_state_dict(before, adapter_in(tmp_path / "checkpoint-6"))
    with pytest.raises(ValueError, match="has shape"):
        trained(tmp_path, {"r": 2}, resume=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_loss(reentrant: bool, plain: dict, tmp_path: Path) -> None:
    model = hf.adapted()
    if reentrant:
        model.enable_input_require_grads()
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer = AdapterTrainer(model, hf.arguments(tmp_path, **kwargs), train_dataset=hf.rows())
    trainer.train()
    same_log(hf.losses_of(trainer), plain["llama"][0])
    agree(get_peft_model_state_dict(model), plain["llama"][1])


# -- each way, in one process and in two -----------------------------------------------------------


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def check_way(way: str, folder: Path, losses: list[float], plain: dict) -> None:
    (same_log if "trainer" in way else agree)(losses, plain["llama"][0])
    agree(adapter_in(folder / "adapter"), plain["llama"][1])
    assert files(folder / "adapter") == RESUMES
    written = files(folder / "work")
    assert bool(written) is ("resume" in way) and not any(name.startswith(("model", "pytorch")) for name in written)


@pytest.mark.parametrize("way", hf.WAYS)
def test_each_way_trains_what_a_plain_loop_does(way: str, plain: dict, tmp_path: Path) -> None:
    check_way(way, tmp_path, hf.run(way, tmp_path)["losses"], plain)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", hf.__file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*line, str(folder), *hf.WAYS], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("way", hf.WAYS)
def test_two_processes_train_what_a_plain_loop_does(way: str, plain: dict, two_processes: Path) -> None:
    for rank in (0, 1):
        said = json.loads((two_processes / way / f"rank{rank}.json").read_text())
        check_way(way, two_processes / way, said["losses"], plain)
