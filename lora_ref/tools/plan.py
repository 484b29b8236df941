"""Memory and operations to train an adapter of a big model: bytes for each GPU, operations for each token.

    operations a token     4 P + 6 A    (full fine-tuning: 6 P)
    bytes of a process     2 P + 16 A,  plus the activations for the backward pass

P is the number of base weights in matrix products, A that of adapter weights. A weight needs two operations forward
and two for the gradient of its input. A trained weight needs two more for its own gradient. A frozen weight is in
bfloat16. An adapter weight is in float32, with its gradient and Adam's two moments: 16 bytes.
"""

import math
from dataclasses import dataclass
from typing import Any

FROZEN_BYTES, TRAINED_BYTES = 2, 16  # of a base weight and of an adapter weight
ENGINES = ("one process", "DDP", "FSDP2", "tensor parallel")


def parameter_count(shape: tuple[int, ...], r: int) -> int:
    """r * (in + out) trained numbers for each weight of shape (..., out, in).

    >>> parameter_count((768, 768), r=8), 768 * 768
    (12288, 589824)
    """
    *batch, n_out, n_in = shape
    return math.prod(batch) * r * (n_in + n_out)


@dataclass(frozen=True)
class Shape:
    """A Llama-like transformer: seven linear layers a block, an embedding and a separate head.

    >>> f"{SHAPES['8B'].parameters():,}"
    '8,030,261,248'
    """

    layers: int
    hidden: int
    intermediate: int
    kv: int  # the outputs of k_proj, and of v_proj
    vocab: int

    def linear(self) -> dict[str, tuple[int, int]]:
        """{layer of a block: (in, out)}."""
        h, f = self.hidden, self.intermediate
        attention = {"q_proj": (h, h), "k_proj": (h, self.kv), "v_proj": (h, self.kv), "o_proj": (h, h)}
        return attention | {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    def block(self) -> int:
        """The weights of a block's linear layers."""
        return sum(n_in * n_out for n_in, n_out in self.linear().values())

    def parameters(self) -> int:
        """The weights of blocks, norms, embedding and head."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.block() + norms + 2 * self.vocab * self.hidden

    def adapter(self, r: int) -> int:
        """r (in + out) for each linear layer of each block. target_modules="all-linear" excludes the head."""
        return self.layers * r * sum(n_in + n_out for n_in, n_out in self.linear().values())


# the published sizes of Llama 3.1, arXiv 2407.21783, table 3
SHAPES = {
    "8B": Shape(layers=32, hidden=4096, intermediate=14336, kv=1024, vocab=128256),
    "70B": Shape(layers=80, hidden=8192, intermediate=28672, kv=1024, vocab=128256),
    "405B": Shape(layers=126, hidden=16384, intermediate=53248, kv=1024, vocab=128256),
}


def nearest_shape(parameters: float) -> Shape:
    """The nearest shape of SHAPES in size, with the number of blocks that is nearest to `parameters`.

    Raises:
        ValueError: fewer parameters than the smallest shape with one block.

    >>> nearest_shape(13e9).layers, f"{nearest_shape(13e9).parameters():.3g}"
    (55, '1.3e+10')
    """
    nearest = min(SHAPES.values(), key=lambda shape: abs(math.log(max(parameters, 1) / shape.parameters())))
    one_block = Shape(1, nearest.hidden, nearest.intermediate, nearest.kv, nearest.vocab)
    if not parameters >= one_block.parameters():
        raise ValueError(f"params={parameters:g}: must be at least {one_block.parameters():.3g}, which is one block")
    blocks = 1 + round((parameters - one_block.parameters()) / (nearest.block() + 2 * nearest.hidden))
    return Shape(blocks, nearest.hidden, nearest.intermediate, nearest.kv, nearest.vocab)


def operations(shape: Shape, r: int, context: int = 0, full: bool = False) -> int:
    """4 P + 6 A operations to train on one token (full fine-tuning: 6 P), plus attention over `context` tokens.

    P includes the head, but not the embedding, which is looked up. A token attends to half of its context on average:
    4 context hidden / 2 forward, twice that backward. Not included: the second forward of activation checkpointing.
    """
    P, A = shape.layers * shape.block() + shape.vocab * shape.hidden, shape.adapter(r)
    attention = 3 * 2 * shape.layers * context * shape.hidden
    return (6 * P if full else 4 * P + 6 * A) + attention


def memory(shape: Shape, r: int, engine: str, gpus: int, tokens: int) -> dict[str, float]:
    """Bytes for each of `gpus` processes, with `tokens` tokens at a time and activation checkpointing.

    Returns {"weights", "adapters", "gathered", "activations", "total"}. FSDP2 shards weights and adapters. It gathers
    two units at a time: two blocks, or a block and the head (embedding and head are separate units). Tensor
    parallelism shards the base weights only. With checkpointing each block stores its input in bfloat16, and the
    running block the inputs and outputs of its layers. Two copies of the logits are stored in float32.

    Raises:
        ValueError: an unknown engine, several GPUs for one process, no GPU or no token.
    """
    if engine not in ENGINES or gpus < 1 or tokens < 1 or (engine == "one process" and gpus > 1):
        raise ValueError(
            f"engine={engine!r}, gpus={gpus}, tokens={tokens}: must be one of {', '.join(ENGINES)}, with at least one "
            "GPU (one process: just one) and one token"
        )
    shards = gpus if engine in ("FSDP2", "tensor parallel") else 1
    running = sum(n_in + n_out for n_in, n_out in shape.linear().values()) * FROZEN_BYTES
    kept = tokens * (shape.layers * shape.hidden * FROZEN_BYTES + running + 2 * 4 * shape.vocab)
    units = shape.block() + max(shape.block(), shape.vocab * shape.hidden)
    sizes = {
        "weights": FROZEN_BYTES * shape.parameters() / shards,
        "adapters": TRAINED_BYTES * shape.adapter(r) / (shards if engine == "FSDP2" else 1),
        "gathered": FROZEN_BYTES * units if engine == "FSDP2" and gpus > 1 else 0,
        "activations": kept,
    }
    return sizes | {"total": sum(sizes.values())}


def memory_table(shape: Shape, r: int, gpus: list[int], tokens: int, gpu_memory: float) -> Any:
    """The memory by engine and number of GPUs, as a rich table. Totals above `gpu_memory` GiB are red."""
    from rich import box
    from rich.table import Table

    view = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=f"GiB a GPU, {tokens:,} tokens at a time"
    )
    view.add_column("engine", no_wrap=True)
    for heading in ("GPUs", "weights", "adapters", "gathered", "kept", "total", f"<= {gpu_memory:g}"):
        view.add_column(heading, justify="right", no_wrap=True)
    for engine in ENGINES:
        for count in [1] if engine == "one process" else [n for n in gpus if n > 1]:
            sizes = {key: size / 2**30 for key, size in memory(shape, r, engine, count, tokens).items()}
            fits = sizes["total"] <= gpu_memory
            cells = [f"{size:,.2f}" for size in sizes.values()]
            view.add_row(engine, str(count), *cells, "yes" if fits else "no", style="" if fits else "red")
    return view


def print_plan(parameters: float, r: int, gpus: list[int], tokens: int, gpu_memory: float, context: int) -> None:
    """Print operations and memory for a model of about `parameters` weights."""
    from rich.console import Console

    shape, console = nearest_shape(parameters), Console(highlight=False)
    ours, full = (operations(shape, r, context, full) for full in (False, True))
    sizes = f"{shape.layers} blocks of width {shape.hidden}: {shape.parameters():,} weights"
    console.print(f"A Llama-like model with {sizes}; adapters of rank {r}, all-linear: {shape.adapter(r):,}.")
    console.print(f"Operations a token: {ours:.3g}, {ours / full:.2f} of full fine-tuning's (context {context:,}).")
    console.print(memory_table(shape, r, gpus, tokens, gpu_memory))
