"""A training step of one adapted Linear, and a call without gradients, over those of the frozen layer.

A step is forward and backward with a gradient of the input, as inside of a deep network.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import loralib
import peft
import torch
from torch import Tensor, nn

import lora_ref
from lora_ref.fast.sums import add_in_place

from .measure import Bar, Case, Job

SHAPES = [(768, 768), (768, 3072), (4096, 4096)]  # (in, out)
LARGE = [(4096, 4096), (4096, 14336)]  # on CUDA
LIBRARIES = {"lora_ref": lora_ref, "PEFT": peft}


def cases(options: Any) -> Iterator[Case]:
    """Steps at each size and precision, then single tokens without gradients."""
    shapes = [(64, 64)] if options.tiny else SHAPES[:2] if options.quick else LARGE if options.cuda else SHAPES
    tokens = [8] if options.tiny else [512] if options.quick else [8192] if options.cuda else [512, 2048]
    for dtype in options.dtypes:
        for shape in shapes:
            for n in tokens:
                yield step(shape, n, dtype, options)
    yield one_token(shapes[0], options)


def step(shape: tuple[int, int], tokens: int, dtype: torch.dtype, options: Any) -> Case:
    """All of one size in one case: the frozen layer, full fine-tuning, and each library at r = 8, 64, p = 0, 0.1."""
    linear = nn.Linear(*shape, device=options.device, dtype=dtype).requires_grad_(False)
    x = torch.randn(tokens, shape[0], device=options.device, dtype=dtype, requires_grad=True)
    g = torch.randn(tokens, shape[1], device=options.device, dtype=dtype)
    whole = nn.Linear(*shape, device=options.device, dtype=dtype)
    jobs: dict[str, Callable[[], Job]] = {
        "frozen": lambda: step_of(linear, x, g),
        "full": lambda: step_of(whole, x, g),
    }
    compiled = options.compile or (options.cuda and not options.quick)
    if compiled:  # each of these is a compilation of its own
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64
        jobs["frozen, compiled"] = lambda: step_of(torch.compile(linear), x, g)
    settings = [(r, p) for r in (8, 64) for p in (0.0, 0.1)]
    for r, p in settings:
        jobs[label("bare", r, p)] = lambda r=r, p=p: bare(linear, x, g, r, p)
        for name, library in LIBRARIES.items():
            jobs[label(name, r, p)] = lambda library=library, r=r, p=p: step_of(adapted(library, linear, r, p), x, g)
            if compiled:
                jobs[label(name, r, p) + ", compiled"] = lambda library=library, r=r, p=p: step_of(
                    torch.compile(adapted(library, linear, r, p)), x, g
                )
        heavy = tokens * shape[0] * shape[1] > 2**34
        if dtype == torch.float32 and not heavy:  # loralib has no other, and does what PEFT does
            jobs[label("loralib", r, p)] = lambda r=r, p=p: step_of(adapted_by_loralib(linear, r, p), x, g)
    return Case(
        theme="Training step of one Linear",
        about={"in": shape[0], "out": shape[1], "tokens": tokens, "dtype": str(dtype).removeprefix("torch.")},
        jobs=jobs,
        floor="frozen",
        bytes=True,
        alive=lambda job: [x, *(job.args[0].parameters() if isinstance(job, partial) else [])],
        computed=partial(best, shape, tokens, dtype, settings, options),
        bars=[*bars(shape, dtype), *(compiled_bar(r, p) for r, p in settings if compiled)],
    )


def compiled_bar(r: int, p: float) -> Bar:
    """A compiled step of lora_ref over the better of PEFT's, compiled, and its own, not compiled.

    Floor: the better one, and what the compiler's own work adds to the frozen layer, which it cannot make faster.
    """

    def times(row: dict[str, Any]) -> tuple[float, float, float]:
        time = {name: ratio["median"] for name, ratio in row["ratios"].items()}
        ours, theirs = label("lora_ref", r, p), f"{label('PEFT', r, p)}, compiled"
        return time[f"{ours}, compiled"], min(time[ours], time[theirs]), time["frozen, compiled"] - 1

    def of(row: dict[str, Any]) -> float:
        compiled, best, _ = times(row)
        return compiled / best

    def floor(row: dict[str, Any]) -> float:
        _, best, added = times(row)
        return (best + added) / best

    text = f"step, r={r}, p={p:g}, compiled: time / the better of PEFT compiled and lora_ref not compiled"
    return Bar(text, of, 1.0, floor)


def label(library: str, r: int, p: float) -> str:
    return f"{library} r={r} p={p:g}"


def overhead(row: dict[str, Any], name: str) -> float:
    """By how much a job takes longer than the floor, as a share of it."""
    return row["ratios"][name]["median"] - 1


def bars(shape: tuple[int, int], dtype: torch.dtype) -> list[Bar]:
    """Overhead over PEFT's, and bytes kept for the backward pass over PEFT's."""

    def of(job: str, r: int, p: float) -> Callable[[dict[str, Any]], float]:
        return lambda row: overhead(row, label(job, r, p)) / overhead(row, label("PEFT", r, p))

    def saved(row: dict[str, Any]) -> float:
        kept = row["saved"]
        return max(kept[label("lora_ref", r, 0.1)] / kept[label("PEFT", r, 0.1)] for r in (8, 64))

    small, half = shape[0] < 4096, ", half precision" * (dtype.itemsize < 4)
    limits = [(8, 0.0, 0.5 if small else 1.0), (64, 0.0, 0.8), (8, 0.1, 0.6), (64, 0.1, 0.6)]
    made = []
    for r, p, at_most in limits:
        width = "" if (r, p) != (8, 0.0) else ", up to 768->3072" if small else ", wider layers"
        text = f"step, r={r}, p={p:g}{width}{half}: overhead / PEFT's"
        made.append(Bar(text, of("lora_ref", r, p), at_most, of("bare", r, p)))
    return [*made, Bar(f"step, p=0.1{half}: bytes kept beyond x / PEFT's", saved, 0.25)]


def best(
    shape: tuple[int, int],
    tokens: int,
    dtype: torch.dtype,
    settings: list[tuple[int, float]],
    options: Any,
    seconds: float,
) -> dict[str, float]:
    """The step ratio of a branch that runs at the base's FLOP/s, or at the memory's speed, whichever is slower.

    FLOPs: 4 T in out for the frozen layer, 6 T r (in + out) for the branch. Bytes: x is read twice more
    and g once, y and dx are read and written; with dropout a mask of one bit an element is free.
    """
    n_in, n_out = shape
    moved = tokens * (4 * n_in + 3 * n_out) * dtype.itemsize
    share = {r: 6 * r * (n_in + n_out) / (4 * n_in * n_out) for r, _ in settings}
    by_bytes = moved / options.bandwidth / seconds
    return {f"r={r} p={p:g}": 1 + max(share[r], by_bytes) for r, p in settings}


def adapted(library: Any, linear: nn.Linear, r: int, p: float) -> nn.Module:
    """The layer that a library puts around `linear`, with B as if trained."""
    config = library.LoraConfig(r=r, lora_alpha=16, lora_dropout=p, target_modules=["0"])
    layer = library.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    return layer.train()


def adapted_by_loralib(linear: nn.Linear, r: int, p: float) -> nn.Module:
    layer = loralib.Linear(linear.in_features, linear.out_features, r=r, lora_alpha=16, lora_dropout=p)
    layer.to(linear.weight.device)
    layer.weight, layer.bias = linear.weight, linear.bias
    nn.init.normal_(layer.lora_B, std=0.02)
    return layer  # never in eval mode, which would merge into the weight that all share


class Products(torch.autograd.Function):
    """A step's products and no more, in their fastest orientation; A and B are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor, A: Tensor, B: Tensor, p: float) -> Tensor:
        wide, kept = x.float(), None
        if p:
            words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
            kept = (words.view(torch.int16)[: x.numel()] >= round(p * 2**16) - 2**15).view(torch.uint8).view(x.shape)
            wide = wide * kept
        z = A @ wide.T
        ctx.save_for_backward(x, W, A, B, z, kept)
        y = nn.functional.linear(x, W, b)
        return add_in_place(y.float(), z.T, B.T).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, z, kept = ctx.saved_tensors
        wide = g.float()
        dz, dB, wide = B.T @ wide.T, (z @ wide).T, x.float()
        dA = dz @ (wide if kept is None else wide * kept)
        if not ctx.needs_input_grad[0]:
            return None, None, None, dA, dB, None
        dx = (g @ W).float()
        dx = add_in_place(dx, dz.T, A) if kept is None else dx.add_((dz.T @ A).mul_(kept))
        return dx.to(x.dtype), None, None, dA, dB, None


def bare(linear: nn.Linear, x: Tensor, g: Tensor, r: int, p: float) -> Job:
    """The measured floor: the products in one autograd function, without a module around it or a question asked."""
    W, b = linear.weight, linear.bias
    shapes = ((r, W.shape[1]), (W.shape[0], r))
    A, B = (torch.randn(shape, device=W.device, requires_grad=True) for shape in shapes)

    def step() -> None:
        Products.apply(x, W, b, A, B, p).backward(g)
        x.grad = A.grad = B.grad = None

    return step


def step_of(layer: nn.Module, x: Tensor, g: Tensor) -> partial[None]:
    """A step; as an optimizer does, it knows from the start which tensors' gradients are to be let go."""
    return partial(forward_backward, layer, x, g, [x, *layer.parameters()])


def forward_backward(layer: nn.Module, x: Tensor, g: Tensor, held: list[Tensor]) -> None:
    layer(x).backward(g)
    for tensor in held:
        tensor.grad = None


def one_token(shape: tuple[int, int], options: Any) -> Case:
    """A forward call on one token without gradients, as in decoding: Python's own cost is what counts."""
    linear = nn.Linear(*shape, device=options.device).requires_grad_(False)
    x = torch.randn(1, 1, shape[0], device=options.device)

    def job(layer: Callable[[Tensor], Tensor]) -> Job:
        def call() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return call

    jobs: dict[str, Callable[[], Job]] = {"frozen": lambda: job(linear)}
    for name, library in LIBRARIES.items():
        jobs[name] = lambda library=library: job(adapted(library, linear, 8, 0.0).eval())
    jobs["loralib"] = lambda: job(adapted_by_loralib(linear, 8, 0.0).requires_grad_(False))
    A, B = torch.randn(8, shape[0], device=options.device), torch.randn(shape[1], 8, device=options.device)
    jobs["bare"] = lambda: job(lambda x: linear(x).view(1, -1).addmm_(x.view(1, -1) @ A.T, B.T))
    return Case(
        theme="One token without gradients",
        about={"in": shape[0], "out": shape[1], "r": 8},
        jobs=jobs,
        floor="frozen",
        bars=[
            Bar(
                "one token without gradients: overhead / PEFT's",
                lambda row: overhead(row, "lora_ref") / max(overhead(row, "PEFT"), math.ulp(1)),
                0.5,
                lambda row: overhead(row, "bare") / max(overhead(row, "PEFT"), math.ulp(1)),
            )
        ],
    )
