"""The demo's experiment: one base network, adapted to rotated digits in several ways."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ... import LoraConfig, PeftModel, get_peft_model
from ...core.scaling import scaling
from .digits import Digits, Network, accuracy, load, logits, train

TARGETS = ["fc1", "fc2", "out"]
# B and A are small, so their steps change s*B*A little: LoRA has a larger learning rate than the weight.
BASE_RATE, LORA_RATE, FULL_RATE = 1e-3, 5e-3, 1e-3


@dataclass(frozen=True)
class Run:
    """One row of the table. Accuracies are shares of the test digits. `None`: does not apply."""

    name: str
    rank: int | None
    alpha: float | None
    scaling: float | None
    trainable: int
    percent: float  # of the network's own parameters
    rotated_before: float
    rotated_after: float
    upright_adapted: float
    upright_disabled: float | None
    curve: list[float]  # rotated accuracy before training and after each epoch


@dataclass(frozen=True)
class Experiment:
    """The trained networks and their rows. `adapted` is the LoRA model of the highest rank."""

    upright: Digits
    rotated: Digits
    base: Network
    adapted: PeftModel
    runs: list[Run]


@contextlib.contextmanager
def fixed_seed(seed: int) -> Iterator[None]:
    """A `with` block in which torch's global generator starts from `seed`. At the end its state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A `with` block in which PyTorch uses one thread. So the sums do not depend on the number of cores.

    And with matrices this small, threads wait longer than they compute: on a busy machine ten times longer.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def process_group() -> Iterator[int]:
    """A `with` block in torchrun's process group. Its value is the rank of this process; 0 without torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield 0
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.get_rank()
        torch.distributed.barrier()  # no process leaves while another still communicates
    finally:
        torch.distributed.destroy_process_group()


def configurations(ranks: list[int], alpha: float) -> list[LoraConfig]:
    """One `LoraConfig` a rank, in rising order; ValueError for an invalid rank or alpha."""
    return [LoraConfig(r=r, lora_alpha=alpha, target_modules=list(TARGETS)) for r in sorted(set(ranks))]


def epochs(quick: bool) -> tuple[int, int]:
    """The epochs of the base network, and of each adaptation."""
    return (10, 10) if quick else (30, 30)


def run_experiment(
    configs: list[LoraConfig], seed: int, quick: bool, start: Callable[[str], None], tick: Callable[[], None]
) -> Experiment:
    """Train the base on upright digits, then adapt copies of it to rotated digits.

    `start(name)` is called before each training and `tick()` after each epoch.
    """
    base_epochs, adapt_epochs = epochs(quick)
    upright = load(seed)
    rotated = upright.rotated()

    start("base network, upright digits")
    with fixed_seed(seed):
        base = Network()
    train(base, upright, base_epochs, BASE_RATE, seed, tick)
    size = sum(parameter.numel() for parameter in base.parameters())
    before = accuracy(base, rotated)
    unadapted = accuracy(base, upright)
    runs = [Run("none", None, None, None, 0, 0.0, before, before, unadapted, None, [])]

    for config in configs:
        start(f"LoRA, r = {config.r}")
        with fixed_seed(seed):
            # get_peft_model changes its argument, so it gets a copy
            adapted = get_peft_model(copy.deepcopy(base), config)
        curve = train(adapted, rotated, adapt_epochs, LORA_RATE, seed, tick)
        trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        with adapted.disable_adapter():
            restored = accuracy(adapted, upright)
        runs.append(
            Run(
                name="LoRA",
                rank=config.r,
                alpha=config.lora_alpha,
                scaling=scaling(config.r, config.lora_alpha, config.use_rslora),
                trainable=trainable,
                percent=100 * trainable / size,
                rotated_before=curve[0],
                rotated_after=curve[-1],
                upright_adapted=accuracy(adapted, upright),
                upright_disabled=restored,
                curve=curve,
            )
        )

    start("full fine-tuning")
    full = copy.deepcopy(base)
    curve = train(full, rotated, adapt_epochs, FULL_RATE, seed, tick)
    lost = accuracy(full, upright)
    runs.append(Run("fine-tuning", None, None, None, size, 100.0, curve[0], curve[-1], lost, None, curve))
    return Experiment(upright, rotated, base, adapted, runs)


def measure(done: Experiment, folder: Path) -> dict[str, float | int]:
    """Save the adapter to `folder`, load it into a copy of the base, merge it, and compare the logits.

    Each difference is max |logit - logit| over the rotated test digits. Their largest logit is `largest_logit`.
    """
    images = done.rotated.test
    done.adapted.save_pretrained(str(folder))
    reloaded = PeftModel.from_pretrained(copy.deepcopy(done.base), str(folder))
    trained_logits, base_logits = logits(done.adapted, images), logits(done.base, images)
    reloaded_logits = logits(reloaded, images)
    with reloaded.disable_adapter():
        disabled_logits = logits(reloaded, images)
    merged: nn.Module = reloaded.merge_and_unload()  # a plain Network with W + s*B*A in place of W

    def largest(difference: torch.Tensor) -> float:
        return difference.abs().max().item()

    return {
        "reloaded_vs_trained": largest(reloaded_logits - trained_logits),
        "merged_vs_adapted": largest(logits(merged, images) - trained_logits),
        "disabled_vs_base": largest(disabled_logits - base_logits),
        "largest_logit": largest(trained_logits),
        "adapter_bytes": (folder / "adapter_model.safetensors").stat().st_size,
        "full_bytes": len(safetensors.torch.save(done.base.state_dict())),
    }
