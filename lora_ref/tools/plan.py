"""What training an adapter of a big model needs: bytes for each GPU and operations for each token, before renting one.

    operations a token     4 P + 6 A    (full fine-tuning: 6 P)
    bytes of a process     2 P + 16 A,  plus what the backward pass keeps

P is the number of weights that tokens are multiplied with, A that of the adapters. Forward and backward are two
operations a weight each; of the frozen weights there is no gradient, which would be two more. A frozen weight is held
in bfloat16. An adapter's is in float32, with its gradient and Adam's two moments: 16 bytes.
"""

import math
from dataclasses import dataclass
from typing import Any

BASE, TRAINED = 2, 16  # bytes of a frozen weight (bfloat16), and of a trained one with its gradient and two moments
ENGINES = ("one process", "DDP", "FSDP2", "tensor parallel")


@dataclass(frozen=True)
class Shape:
    """A Llama-like transformer: seven linear layers a block, an embedding, and a head of its own.

    >>> f"{SHAPES['8B'].parameters():,}"
    '8,030,261,248'
    """

    layers: int
    hidden: int
    intermediate: int
    kv: int  # the outputs of k_proj and of v_proj: heads share them
    vocab: int

    def linear(self) -> dict[str, tuple[int, int]]:
        """{layer of a block: (in, out)}."""
        h, f = self.hidden, self.intermediate
        attention = {"q_proj": (h, h), "k_proj": (h, self.kv), "v_proj": (h, self.kv), "o_proj": (h, h)}
        return attention | {"gate_proj": (h, f), "up_proj": (h, f), "down_proj": (f, h)}

    def block(self) -> int:
        """Weights of a block's linear layers."""
        return sum(n_in * n_out for n_in, n_out in self.linear().values())

    def parameters(self) -> int:
        """All of them: blocks, norms, embedding and head."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.block() + norms + 2 * self.vocab * self.hidden

    def adapter(self, r: int) -> int:
        """r (in + out) for each linear layer of each block: target_modules="all-linear" leaves the head out."""
        return self.layers * r * sum(n_in + n_out for n_in, n_out in self.linear().values())


# the published sizes of Llama 3.1, arXiv 2407.21783, table 3
SHAPES = {
    "8B": Shape(layers=32, hidden=4096, intermediate=14336, kv=1024, vocab=128256),
    "70B": Shape(layers=80, hidden=8192, intermediate=28672, kv=1024, vocab=128256),
    "405B": Shape(layers=126, hidden=16384, intermediate=53248, kv=1024, vocab=128256),
}


def shape_of(parameters: float) -> Shape:
    """The shape of SHAPES that is nearest in size, with as many blocks as come nearest to `parameters`.

    Raises:
        ValueError: fewer parameters than the smallest shape with one block.

    >>> shape_of(13e9).layers, f"{shape_of(13e9).parameters():.3g}"
    (55, '1.3e+10')
    """
    near = min(SHAPES.values(), key=lambda shape: abs(math.log(max(parameters, 1) / shape.parameters())))
    one_block = Shape(1, near.hidden, near.intermediate, near.kv, near.vocab)
    if not parameters >= one_block.parameters():
        raise ValueError(f"params={parameters:g}: must be at least {one_block.parameters():.3g}, which is one block")
    blocks = 1 + round((parameters - one_block.parameters()) / (near.block() + 2 * near.hidden))
    return Shape(blocks, near.hidden, near.intermediate, near.kv, near.vocab)


def operations(shape: Shape, r: int, context: int = 0, full: bool = False) -> int:
    """Operations to train on one token: 4 P + 6 A, or 6 P with full fine-tuning, and attention over `context` tokens.

    P counts the head and not the embedding, which is looked up. A token attends to half of its context on average:
    4 context hidden / 2 forward, twice that backward. Activation checkpointing adds another forward: a half of 4 P.
    """
    P, A = shape.layers * shape.block() + shape.vocab * shape.hidden, shape.adapter(r)
    attention = 3 * 2 * shape.layers * context * shape.hidden
    return (6 * P if full else 4 * P + 6 * A) + attention


def memory(shape: Shape, r: int, engine: str, gpus: int, tokens: int) -> dict[str, float]:
    """Bytes that each of `gpus` processes needs to train on `tokens` tokens at a time, with activation checkpointing.

    Returns {"weights", "adapters", "gathered", "activations", "total"}. FSDP2 cuts weights and adapters and gathers two
    units at a time: blocks, or a block and the head (the embedding and the head are units of their own). Tensor
    parallelism cuts the base weights alone. With checkpointing each block keeps its input, in bfloat16, and the block
    at work the inputs and outputs of its layers; logits are there twice, in float32.

    Raises:
        ValueError: an engine that is not one of ENGINES, several GPUs for one process, no GPU or no token.
    """
    if engine not in ENGINES or gpus < 1 or tokens < 1 or (engine == "one process" and gpus > 1):
        raise ValueError(
            f"engine={engine!r}, gpus={gpus}, tokens={tokens}: must be one of {', '.join(ENGINES)}, with at least one "
            "GPU (one process: just one) and one token"
        )
    cut = gpus if engine in ("FSDP2", "tensor parallel") else 1
    at_work = sum(n_in + n_out for n_in, n_out in shape.linear().values()) * BASE
    kept = tokens * (shape.layers * shape.hidden * BASE + at_work + 2 * 4 * shape.vocab)
    units = shape.block() + max(shape.block(), shape.vocab * shape.hidden)
    found = {
        "weights": BASE * shape.parameters() / cut,
        "adapters": TRAINED * shape.adapter(r) / (cut if engine == "FSDP2" else 1),
        "gathered": BASE * units if engine == "FSDP2" and gpus > 1 else 0,
        "activations": kept,
    }
    return found | {"total": sum(found.values())}


def table(shape: Shape, r: int, gpus: list[int], tokens: int, gpu_memory: float) -> Any:
    """What each engine needs on each number of GPUs, as a rich table; in red what `gpu_memory` GiB do not hold."""
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


def run(parameters: float, r: int, gpus: list[int], tokens: int, gpu_memory: float, context: int) -> None:
    """Print the plan for a model of so many parameters."""
    from rich.console import Console

    shape, console = shape_of(parameters), Console(highlight=False)
    ours, full = (operations(shape, r, context, full) for full in (False, True))
    sizes = f"{shape.layers} blocks of width {shape.hidden}: {shape.parameters():,} weights"
    console.print(f"A Llama-like model with {sizes}; adapters of rank {r}, all-linear: {shape.adapter(r):,}.")
    console.print(f"Operations a token: {ours:.3g}, {ours / full:.2f} of full fine-tuning's (context {context:,}).")
    console.print(table(shape, r, gpus, tokens, gpu_memory))
