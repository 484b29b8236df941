"""How exact the distributed engines are on an adapted model, and what each rank holds: writes results.json.

    python tests/distributed/measure.py

Exactness: the largest difference of a loss, and of a number in the saved adapter, between two processes and one, for
each way of worker.py and of huggingface.py, in float64 (Trainer's log of losses is float32). Memory: one training step
of a small Llama-like model, measured in bytes for each rank, next to what `lora_ref.tools.plan` says for that shape.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_ref import LoraConfig, PeftModel, get_peft_model
from lora_ref.tools.plan import ENGINES, Shape, memory

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = ["ddp", "ddp+checkpointing", "fsdp", "fsdp+checkpointing", "fsdp+dcp", "hsdp", "tp"]
SHAPE, RANK = Shape(layers=6, hidden=256, intermediate=768, kv=128, vocab=4096), 8
ROWS, LENGTH = 4, 64  # the batch of all ranks together


# -- memory: in each rank ------------------------------------------------------------------------


def model_of(shape: Shape) -> PeftModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "vocab_size": shape.vocab}
    heads = {"num_attention_heads": shape.hidden // 32, "num_key_value_heads": shape.kv // 32}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, num_hidden_layers=shape.layers, use_cache=False)
    net = LlamaForCausalLM(config).to(torch.bfloat16)
    return get_peft_model(net, LoraConfig(r=RANK, target_modules="all-linear")).train()


def distribute(model: PeftModel, engine: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh

    net: Any = model.get_base_model()
    if engine == "DDP":  # its buckets are the gradients then, and no copy of them
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if engine == "FSDP2":
        from torch.distributed.fsdp import fully_shard

        for part in (net.model.embed_tokens, *net.model.layers, net.lm_head):
            fully_shard(part, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        from torch.distributed.tensor import Replicate
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        whole = ColwiseParallel(output_layouts=Replicate())
        linear = {f"model.layers.*.{part}.*.base_layer": whole for part in ("self_attn", "mlp")}
        parallelize_module(net, mesh, linear | {"lm_head": whole})
        parallelize_module(net, mesh, {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())})
    return model


def local(tensor: Tensor) -> Tensor:
    """This rank's part, and of what is still on its way from others the tensor that it will be."""
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return getattr(tensor, "elem", tensor)


def size(tensor: Tensor) -> int:
    return local(tensor).numel() * tensor.element_size()


class Kept:
    """Bytes that autograd saves for the backward pass and that are no parameter, each memory counted once."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.counts = model, True
        self.saved: WeakSet[Any] = WeakSet()

    def note(self, tensor: Tensor) -> Tensor:
        memory = local(tensor).untyped_storage()
        owned = {local(p).untyped_storage().data_ptr() for p in self.model.parameters()}
        if self.counts and memory.data_ptr() not in owned:
            self.saved.add(memory)
        return tensor

    def now(self) -> int:
        """What is alive of it: an address may be that of several, one after the other."""
        return sum(memory.nbytes() for memory in self.saved)

    def __call__(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.note, lambda tensor: tensor)


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once after any operation, in memory that operations or parameters hold."""

    def __init__(self, *held: Tensor) -> None:
        super().__init__()
        self.alive: WeakSet[Any] = WeakSet()
        self.most = 0
        self.see(held)

    def see(self, tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                self.alive.add(local(tensor).untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # first what it is made of: the operations on this rank's parts come here, too
        out = func(*args, **(kwargs or {}))
        self.see(tree_leaves(out))
        self.most = max(self.most, sum(memory.nbytes() for memory in self.alive))
        return out


def batch(rank: int, world: int) -> dict[str, Tensor]:
    tokens = torch.randint(0, SHAPE.vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))[rank::world]
    return {"input_ids": tokens, "labels": tokens}


def measured(engine: str) -> dict[str, float]:
    """Bytes of this rank, by the names that `plan.memory` has."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if engine != "one process" else (0, 1)
    model = model_of(SHAPE)
    net: Any = model.get_base_model()
    trained = distribute(model, engine) if world > 1 else model
    data = batch(*((0, 1) if engine == "tensor parallel" else (rank, world)))  # its ranks see the same batch

    block = Kept(model)  # what one block keeps when nothing is recomputed
    block.counts = False
    first = net.model.layers[0]
    hooks = [first.register_forward_pre_hook(lambda *_: setattr(block, "counts", True))]
    kept_by_block = []

    def after(*_: Any) -> None:
        block.counts = False
        kept_by_block.append(block.now())

    hooks += [first.register_forward_hook(after)]
    with block():
        trained(**data).loss.backward()
    for hook in hooks:
        hook.remove()

    net.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()  # from here on there are moments
    optimizer.zero_grad()
    gathered = [0]

    def whole(*_: Any) -> None:
        held = sum(size(p) for p in model.parameters() if not hasattr(p, "to_local"))
        gathered[0] = max(gathered[0], held)

    if engine == "FSDP2":
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_pre_hook(whole)
    kept = Kept(model)
    states = [t for state in optimizer.state.values() for t in state.values()]
    with Peak(*model.parameters(), *states) as peak:
        with kept():
            loss = trained(**data).loss
        activations = kept.now() + sum(kept_by_block)
        loss.backward()
        optimizer.step()
    trains = [p for p in model.parameters() if p.requires_grad]
    frozen = sum(size(p) for p in model.parameters() if not p.requires_grad)
    return {
        "weights": frozen,
        "adapters": sum(map(size, [*trains, *(p.grad for p in trains), *states])),
        "gathered": gathered[0],
        "activations": activations,
        "peak": peak.most,
    }


def in_rank(engine: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if engine != "one process":
        dist.init_process_group("gloo")
    found = measured(engine)
    (folder / f"rank{os.environ.get('RANK', 0)}.json").write_text(json.dumps(found), encoding="utf-8")
    if engine != "one process":
        dist.barrier()
        dist.destroy_process_group()


# -- all of it -----------------------------------------------------------------------------------


def started(script: Path, *arguments: str, processes: int) -> None:
    line = [sys.executable, *(TORCHRUN if processes > 1 else []), str(script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(line, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}: {done.stderr[-3000:]}")


def left(folder: Path, processes: int) -> tuple[list[list[float]], dict[str, Tensor]]:
    losses = [json.loads((folder / f"rank{rank}.json").read_text())["losses"] for rank in range(processes)]
    return losses, load_file(folder / "adapter" / "adapter_model.safetensors")


def difference(one: Path, two: Path) -> dict[str, float]:
    (alone,), tensors = left(one, 1)
    together, others = left(two, 2)
    loss = max(abs(a - b) for losses in together for a, b in zip(losses, alone, strict=True))
    return {"loss": loss, "tensor": max((others[key] - tensors[key]).abs().max().item() for key in tensors)}


def exactness(folder: Path) -> dict[str, dict[str, float]]:
    import huggingface

    worker, found = HERE / "worker.py", {}
    (folder / "one").mkdir()
    started(worker, "one", str(folder / "one"), "default", processes=1)
    for way in WAYS:
        (folder / way).mkdir()
        started(worker, way, str(folder / way), "default", processes=2)
        found[way] = difference(folder / "one", folder / way)
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        started(HERE / "huggingface.py", str(folder / str(processes)), *huggingface.WAYS, processes=processes)
    return found | {way: difference(folder / "1" / way, folder / "2" / way) for way in huggingface.WAYS}


def bytes_of_ranks(folder: Path, engines: Sequence[str] = ENGINES) -> dict[str, dict[str, Any]]:
    """{engine: {"processes", "tokens": of a rank, "measured": of the rank that holds most, "planned"}}."""
    found = {}
    for engine in engines:
        processes = 1 if engine == "one process" else 2
        (folder / engine).mkdir()
        started(Path(__file__), engine, str(folder / engine), processes=processes)
        ranks = [json.loads((folder / engine / f"rank{rank}.json").read_text()) for rank in range(processes)]
        tokens = ROWS * LENGTH // (1 if engine == "tensor parallel" else processes)
        largest = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
        planned = memory(SHAPE, RANK, engine, processes, tokens)
        found[engine] = {"processes": processes, "tokens": tokens, "measured": largest, "planned": planned}
    return found


def main(out: Path = RESULTS) -> None:
    machine = {"torch": torch.__version__, "python": platform.python_version(), "backend": "gloo"}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("exactness", "memory"):
            (Path(folder) / name).mkdir()
        results: dict[str, Any] = {"machine": machine, "shape": vars(SHAPE) | {"r": RANK}}
        parts: dict[str, Callable[[Path], Any]] = {"exactness": exactness, "memory": bytes_of_ranks}
        results |= {name: part(Path(folder) / name) for name, part in parts.items()}
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        in_rank(sys.argv[1], Path(sys.argv[2]))
        sys.stdout.flush()
        os._exit(0)  # gloo's threads now and then abort the interpreter's own end
    main(*map(Path, sys.argv[1:]))
