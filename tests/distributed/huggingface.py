"""What test_trainer.py trains, in one process or as a rank: `torchrun ... huggingface.py FOLDER WAY ...`.

Small networks of transformers with random weights, adapted, and trained by `transformers.Trainer`, by a loop with
`accelerate`, or by a plain one. A way with "+resume" stops in the middle, and goes on with a fresh model.

All of it is computed in float64. Only the cosines of Llama's positions and Trainer's log of losses are float32.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.loss.loss_utils import fixed_cross_entropy
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_ref import LoraConfig, PeftModel, get_peft_model

STEPS, BATCH, VOCAB = 6, 8, 40
RATE = 0.05
EPSILON = 1e-3  # with a smaller one Adam makes steps of rounding errors, where a gradient is nearly zero
WAYS = ("trainer", "trainer+resume", "accelerate", "accelerate+resume")


def recipe(name: str, **given: Any) -> dict[str, Any]:
    """The names that page 15's first block of code with this name in it defines: what is tested is what is printed."""
    text = (Path(__file__).resolve().parents[2] / "tutorials" / "15_trainer.md").read_text(encoding="utf-8")
    block = next(code for code in re.findall(r"```python\n(.*?)```", text, flags=re.S) if name in code)
    names = dict(given)
    exec(block, names)
    return names


def net_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    ends = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    net: Any
    if kind == "gpt2":
        plain = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        net = GPT2LMHeadModel(GPT2Config(n_positions=16, n_embd=16, n_layer=2, n_head=2, **plain, **ends))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        net = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, **ends))
    return in_float64(net)


def in_float64(net: Any) -> nn.Module:
    """The network in float64, with a norm and a loss in float64: those of transformers compute in float32."""
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):
                setattr(module, name, nn.RMSNorm(len(child.weight), child.variance_epsilon))
    net.loss_function = next_token_loss
    return net.double()


def next_token_loss(
    logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any
) -> Tensor:
    """transformers' ForCausalLMLoss without its first line, `logits.float()`."""
    targets = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    return fixed_cross_entropy(logits.view(-1, vocab_size), targets.reshape(-1), num_items_in_batch)


def adapted(kind: str = "llama", **options: Any) -> PeftModel:
    net = net_of(kind)
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "fan_in_fan_out": kind == "gpt2"} | options
    return get_peft_model(net, LoraConfig(**options))


def rows(count: int = STEPS * BATCH, seed: int = 0) -> list[dict[str, Tensor]]:
    """Few sentences, so that there is something to learn. The first token is no target, and is not counted as one.

    (Trainer divides GPT-2's sum of losses by the number of labels, the first of each row included; Llama's not.)
    """
    start = torch.randint(0, 4, (count, 1), generator=torch.Generator().manual_seed(seed))
    tokens = (start + 3 * torch.arange(9)) % VOCAB
    labels = tokens.clone()
    labels[:, 0] = -100
    return [{"input_ids": row, "labels": targets} for row, targets in zip(tokens, labels, strict=True)]


def batches(skip: int = 0) -> list[dict[str, Tensor]]:
    taken = [rows()[n : n + BATCH] for n in range(0, STEPS * BATCH, BATCH)]
    return [{key: torch.stack([row[key] for row in batch]) for key in batch[0]} for batch in taken[skip:]]


def trains(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trains(model), lr=RATE, eps=EPSILON, weight_decay=0.0)


def plain(model: nn.Module) -> list[float]:
    """The loop that the others are compared with: it knows of neither library."""
    losses, optimizer = [], adam(model.train())
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """As plain as the loop above: the rate stays, no gradient is clipped, the data come in their order."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    options = {"save_strategy": "no", "max_steps": STEPS, "ddp_backend": "gloo" if world > 1 else None} | options
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH // world,
        learning_rate=RATE,
        adam_epsilon=EPSILON,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        log_level="error",
        **options,
    )


def fresh() -> None:
    """Accelerate's state is one for the process; of a test or way before it would be left what that asked for."""
    AcceleratorState._reset_state()
    PartialState._reset_state()


def losses_of(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_trainer(folder: Path, resume: bool) -> tuple[list[float], PeftModel]:
    kind = recipe("AdapterTrainer")["AdapterTrainer"]
    if not resume:
        trainer = kind(adapted(), arguments(folder), train_dataset=rows())
        trainer.train()
        return losses_of(trainer), trainer.adapted
    half = STEPS // 2
    kind(
        adapted(), arguments(folder, max_steps=half, save_steps=half, save_strategy="steps"), train_dataset=rows()
    ).train()
    fresh()
    trainer = kind(adapted(), arguments(folder), train_dataset=rows())
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{half}"))
    return losses_of(trainer), trainer.adapted


def with_accelerate(folder: Path, resume: bool) -> tuple[list[float], PeftModel]:
    half, losses, model = STEPS // 2 if resume else STEPS, [], None
    for part in (range(half), range(half, STEPS)):
        if not part:
            break
        fresh()
        accelerator = Accelerator(cpu=True)
        recipe("register_save_state_pre_hook", accelerator=accelerator)
        net = adapted().train()
        loader = torch.utils.data.DataLoader(rows(), BATCH // accelerator.num_processes)
        model, optimizer, loader = accelerator.prepare(net, adam(net), loader)
        if part.start:
            accelerator.load_state(folder / "state")
        data = iter(accelerator.skip_first_batches(loader, part.start))
        for _ in part:
            loss = model(**next(data)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if part.stop < STEPS:
            accelerator.save_state(folder / "state")
    return losses, accelerator.unwrap_model(model)


def run(way: str, folder: Path) -> dict[str, Any]:
    fresh()
    train = with_trainer if way.startswith("trainer") else with_accelerate
    losses, model = train(folder / "work", "resume" in way)
    model.save_pretrained(folder / "adapter")
    return {"losses": losses}


def main(folder: Path, ways: list[str]) -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    for way in ways:
        (folder / way).mkdir(exist_ok=True)
        (folder / way / f"rank{rank}.json").write_text(json.dumps(run(way, folder / way)), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own end
