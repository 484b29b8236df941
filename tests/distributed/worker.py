"""One rank of tests/distributed/test_distributed.py: `torchrun --nproc-per-node 2 worker.py WAY FOLDER START`.

Trains a small adapted network for a few steps in one of the ways that PyTorch distributes training, and leaves in
FOLDER the losses, the adapter that save_pretrained writes, and what each rank holds in memory. All of it is float64.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_ref import LoraConfig, PeftModel, get_peft_model

WIDTH, STEPS, BATCH = 16, 6, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(24, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 24)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


STARTS = {
    "default": {"target_modules": ["embed", "up", "down"], "rank_pattern": {"up": 2}, "modules_to_save": ["head"]},
    "pissa": {"target_modules": ["up", "down"], "init_lora_weights": "pissa", "bias": "lora_only"},
}


def adapted(start: str = "default") -> PeftModel:
    torch.manual_seed(0)
    net = Net().double()
    torch.manual_seed(1)
    return get_peft_model(net, LoraConfig(r=4, lora_alpha=8, **STARTS[start]))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def train(
    model: nn.Module, rank: int, world: int, steps: range = range(STEPS), optimizer: object = None
) -> list[float]:
    """Each rank has its share of every batch, so that the mean of the ranks' losses is that of one process."""
    optimizer = optimizer or optimizer_of(model)
    losses = []
    for step in steps:
        tokens = torch.randint(0, 24, (BATCH, 5), generator=torch.Generator().manual_seed(step))[rank::world]
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        shared = loss.detach().clone()
        if world > 1:
            dist.all_reduce(shared)
        losses.append(shared.item() / world)
    return losses


def shard(model: PeftModel, mesh: object) -> None:
    """FSDP2: each block is a unit, base weights and factors together."""
    from torch.distributed.fsdp import fully_shard

    for block in model.get_base_model().layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def held(model: nn.Module) -> int:
    """Bytes of parameters that this rank holds."""
    local = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return sum(p.numel() * p.element_size() for p in local)


def main(way: str, folder: Path, start: str = "default") -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if world > 1:
        from torch.distributed.device_mesh import init_device_mesh

        dist.init_process_group("gloo")
    refusals: dict[str, str] = {}
    model = adapted(start)
    trained: nn.Module = model
    if "checkpointing" in way:
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    if way.startswith("fsdp"):
        shard(model, init_device_mesh("cpu", (world,)))
        refusals = refused(model) if way == "fsdp" else {}
    elif way == "hsdp":
        shard(model, init_device_mesh("cpu", (world, 1), mesh_dim_names=("replicate", "shard")))
    elif way == "tp":
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        whole = ColwiseParallel(output_layouts=Replicate())
        mesh = init_device_mesh("cpu", (world,))
        plan = {f"layers.*.{name}.base_layer": whole for name in ("up", "down")}
        parallelize_module(model.get_base_model(), mesh, plan)
    elif way.startswith("ddp"):
        trained = nn.parallel.DistributedDataParallel(model)
    share = (0, 1) if way == "tp" else (rank, world)  # tensor parallel ranks see the same batch
    if way == "fsdp+dcp":
        losses, model = train_and_resume(model, *share, folder)
    else:
        losses = train(trained, *share)
    model.save_pretrained(folder / "adapter")
    said = {"losses": losses, "bytes": held(model), "refusals": refusals}
    (folder / f"rank{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def train_and_resume(model: PeftModel, rank: int, world: int, folder: Path) -> tuple[list[float], PeftModel]:
    """Half of the steps; what trains goes through torch.distributed.checkpoint into a fresh model; the other half."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    optimizer = optimizer_of(model)
    losses = train(model, rank, world, range(STEPS // 2), optimizer)
    weights, state = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    again = adapted()
    shard(again, init_device_mesh("cpu", (world,)))
    optimizer = optimizer_of(again)
    weights, state = get_state_dict(again, optimizer, options=options)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(again, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    losses += train(again, rank, world, range(STEPS // 2, STEPS), optimizer)
    return losses, again


def refused(model: PeftModel) -> dict[str, str]:
    """What cannot be done to sharded weights, and what is said about it."""
    config = LoraConfig(r=2, target_modules=["up"])
    tries = {
        "merge": model.merge_adapter,
        "merge_and_unload": model.merge_and_unload,
        "unload": model.unload,
        "add": lambda: model.add_adapter("late", config),
        "delete": lambda: model.delete_adapter("default"),
    }
    said = {}
    for name, attempt in tries.items():
        try:
            attempt()
            said[name] = ""
        except ValueError as error:
            said[name] = str(error)
    return said


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort the interpreter's own end
