"""What the initialisations cost: lora_ref against PEFT on the same weight, as ratios.

    python benchmarks/init.py [--quick] [--threads 1 2] [--only NAME] [--out FOLDER]

Both do the whole job, `get_peft_model` and what must go before or after it, by turns in one process; a
ratio is PEFT's time over ours, the median over the turns. An error is measured against float64. Memory is
the peak of the resident set above what stood there before, in units of W's size, each in a process of its
own. Absolute times depend on the machine and are not printed.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import scipy
import torch
from peft.tuners.lora.corda import preprocess_corda as peft_preprocess_corda
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

import lora_ref
from lora_ref import numerics
from lora_ref.numerics.quantization import codebook

R = 16
QUICK = False
Job = Callable[[], Any]


# -- what is adapted ---------------------------------------------------------------------------


def weight(n_out: int, n_in: int, spectrum: str) -> Tensor:
    """A float32 weight: "flat" (Gaussian entries), or "decaying" with singular values 1 / (1 + k / 4)."""
    generator = torch.Generator().manual_seed(0)
    if spectrum == "flat":
        return torch.randn(n_out, n_in, generator=generator) / n_in**0.5
    U, V = (mixed_cosines(n, min(n_out, n_in), generator) for n in (n_out, n_in))
    return (U / (1 + torch.arange(U.shape[1]) / 4)) @ V.T


def mixed_cosines(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns: some of the discrete cosine transform's, in any order and with random signs of the rows."""
    i, j = torch.arange(rows).double()[:, None], torch.randperm(rows, generator=generator)[:columns].double()
    basis = torch.cos(torch.pi / rows * (i + 0.5) * j) * (2 / rows) ** 0.5
    basis[:, j == 0] /= 2**0.5
    return (basis * (torch.randint(2, (rows, 1), generator=generator) * 2 - 1)).float()


def linear(W: Tensor) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(W.clone())
    return layer


def size(small: int) -> int:
    """A dimension, a quarter of it with --quick."""
    return small // 4 if QUICK else small


# -- the cases: each yields the two jobs, and an error of a result -----------------------------


class Case:
    """One comparison. `job(library)` prepares a fresh copy and returns what is timed; `error` is of its result."""

    name: str
    began: float | None = None  # where the job says itself from when on it is to be timed
    peer = "PEFT"
    bar: float  # how many times faster it must be, at full size and one thread
    error_of: str  # what `error` measures

    def job(self, ours: bool) -> Job:
        raise AttributeError("a case must say what it runs")

    def error(self, result: Any) -> float:
        raise AttributeError("a case must say how good the result is")


class OneWeight(Case):
    """Adapt a model of one linear layer with an initialisation whose first update is not zero."""

    def __init__(self, name: str, value: str, shape: tuple[int, int], spectrum: str, bar: float) -> None:
        self.name, self.value, self.bar = name, value, bar
        self.W = weight(*map(size, shape), spectrum)
        self.error_of = "|s B A - best| / |best|" if value.startswith("pissa") else "|W - residual - s B A| / |W|"
        self.best: Tensor | None = None

    def prepare(self, ours: bool, net: nn.Module, config: Any) -> None:
        """Most methods need no data."""

    def job(self, ours: bool) -> Job:
        library: Any = lora_ref if ours else peft
        net = nn.Sequential(linear(self.W))
        config = library.LoraConfig(r=R, lora_alpha=R, target_modules=["0"], init_lora_weights=self.value)

        def run() -> Any:
            self.prepare(ours, net, config)
            return library.get_peft_model(net, config)

        return run

    def error(self, result: Any) -> float:
        layer = result.base_model.model[0]
        A, B = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        W, D = self.W.double(), layer.scaling["default"] * B @ A
        if not self.value.startswith("pissa"):
            ours = isinstance(layer, lora_ref.LoraLayer)  # it keeps W, where PEFT replaces it
            return relative(W - (layer.residual("default") if ours else layer.base_layer.weight.detach()) - D, W)
        if self.best is None:
            U, S, Vh = numerics.leading_svd(W, R)
            self.best = (U * S) @ Vh
        return relative(D - self.best, self.best)


class CorDA(OneWeight):
    """8 calls of 256 tokens; `whole`: with the pass over them, where most of the time is X^T X for both libraries."""

    def __init__(self, name: str, shape: tuple[int, int], bar: float, method: str = "ipm", whole: bool = False) -> None:
        super().__init__(name, "corda", shape, "decaying", bar)
        self.method, self.whole = method, whole
        n_in = self.W.shape[1]
        scales = 1 / (1 + torch.arange(n_in) / 16)
        generator = torch.Generator().manual_seed(1)
        self.data = [torch.randn(1, 256, n_in, generator=generator) * scales for _ in range(8)]

    def job(self, ours: bool) -> Job:
        library: Any = lora_ref if ours else peft
        net = nn.Sequential(linear(self.W))
        make = library.CordaConfig if ours else peft.tuners.lora.config.CordaConfig
        config = library.LoraConfig(
            r=R,
            lora_alpha=R,
            target_modules=["0"],
            init_lora_weights="corda",
            corda_config=make(corda_method=self.method),
        )
        preprocess: Any = lora_ref.preprocess_corda if ours else peft_preprocess_corda
        options = {"progress": False} if ours else {}

        def run_model() -> None:
            for x in self.data:
                net(x)
            if not self.whole:
                self.began = time.perf_counter()

        def run() -> Any:
            preprocess(net, config, run_model=run_model, **options)
            return library.get_peft_model(net, config)

        return run


class EVA(Case):
    """Four blocks of two layers that share their input, 8 batches of 512 tokens with deviations i^-power; rho = 2."""

    name, error_of = "eva", "1 - mean cosine^2 to the exact components"

    def __init__(self, width: int, power: float, bar: float) -> None:
        self.bar, self.width = bar, size(width)
        self.name = f"eva, 8 x 512 tokens, i^-{power:g}"
        generator = torch.Generator().manual_seed(0)
        scales = torch.arange(1.0, self.width + 1) ** -power
        self.data = [{"x": torch.randn(512, self.width, generator=generator) * scales} for _ in range(8)]
        self.states = [torch.randn(self.width, self.width, generator=generator) / self.width**0.5 for _ in range(8)]
        self.exact: list[Tensor] | None = None

    def job(self, ours: bool) -> Job:
        library: Any = lora_ref if ours else peft
        net = Blocks(self.states)
        config = library.LoraConfig(
            r=R,
            target_modules=["one", "two"],
            init_lora_weights="eva",
            eva_config=library.EvaConfig(rho=2.0),
        )
        model = library.get_peft_model(net, config)
        bar = {"show_progress_bar": False}
        whole: Any = (
            {}
            if ours
            else {
                "forward_fn": lambda m, batch: m(**batch),
                "prepare_model_inputs_fn": None,
                "prepare_layer_inputs_fn": rows,
            }
        )

        def run() -> Any:
            library.initialize_lora_eva_weights(model, self.data, **bar, **whole)
            return model

        return run

    def error(self, result: Any) -> float:
        """How far A's rows are from the span of as many exact principal components of the layer's inputs."""
        if self.exact is None:
            self.exact = exact_components(Blocks(self.states), self.data)
        lost, rows_seen = 0.0, 0
        for block, components in zip(result.base_model.model.blocks, self.exact, strict=True):
            for layer in (block.one, block.two):
                if not hasattr(layer, "lora_A"):
                    continue  # rank 0
                A = layer.lora_A["default"].weight.detach().double()
                lost += float(len(A) - torch.linalg.norm(A @ components[: len(A)].T) ** 2)
                rows_seen += len(A)
        return lost / rows_seen


def rows(x: Tensor, *_: Any) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


class Block(nn.Module):
    def __init__(self, one: Tensor, two: Tensor) -> None:
        super().__init__()
        self.one, self.two = linear(one), linear(two)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.one(x)) + self.two(x)


class Blocks(nn.Module):
    def __init__(self, states: list[Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(*states[i : i + 2]) for i in range(0, len(states), 2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def exact_components(net: Blocks, data: list[dict[str, Tensor]]) -> list[Tensor]:
    """The 2 R leading principal components of each block's inputs, in float64."""
    x, found = torch.cat([batch["x"] for batch in data]), []
    for block in net.blocks:
        centred = x.double() - x.double().mean(0)
        found.append(numerics.leading_svd(centred, 2 * R)[2])
        x = block(x)
    return found


class LoftQ(Case):
    """PEFT's LoftQ needs bitsandbytes and CUDA: the peer is its former way on the CPU, see `loftq_by_table`."""

    peer, error_of = "table + full SVD", "|W - Q - s B A| / |W|"

    def __init__(self, name: str, shape: tuple[int, int], bar: float) -> None:
        self.name, self.bar = name, bar
        self.W = weight(*map(size, shape), "flat")

    def job(self, ours: bool) -> Job:
        if not ours:
            return lambda: loftq_by_table(self.W, R, bits=4, iterations=5)
        net = nn.Sequential(linear(self.W))
        loftq = lora_ref.LoftQConfig(loftq_bits=4, loftq_iter=5)
        config = lora_ref.LoraConfig(
            r=R, lora_alpha=R, target_modules=["0"], init_lora_weights="loftq", loftq_config=loftq
        )
        return lambda: lora_ref.get_peft_model(net, config)

    def error(self, result: Any) -> float:
        if isinstance(result, Tensor):
            return relative(self.W - result, self.W)
        layer = result.base_model.model[0]
        return relative(self.W - layer.residual("default") - layer.delta("default").detach(), self.W)


def relative(error: Tensor, of: Tensor) -> float:
    return float(torch.linalg.norm(error.double()) / torch.linalg.norm(of.double()))


def loftq_by_table(W: Tensor, r: int, bits: int, iterations: int) -> Tensor:
    """Q + B A as a quantiser with a table of all distances (numel, 2^bits) and a full SVD a turn give it."""
    codes = torch.from_numpy(codebook(bits)).float()
    D = torch.zeros_like(W)
    for _ in range(iterations):
        blocks = (W - D).reshape(-1, 64)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = ((blocks / scale).reshape(-1, 1) - codes).abs().argmin(1)
        Q = (codes[nearest].reshape(blocks.shape) * scale).reshape(W.shape)
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        D = (U[:, :r] * S[:r]) @ Vh[:r]
    return Q + D


CASES: dict[str, Callable[[], Case]] = {
    "pissa": lambda: OneWeight("pissa, decaying", "pissa", (4096, 4096), "decaying", 40),
    "pissa_flat": lambda: OneWeight("pissa, flat", "pissa", (4096, 4096), "flat", 10),
    "pissa_niter_4": lambda: OneWeight("pissa_niter_4, decaying", "pissa_niter_4", (4096, 4096), "decaying", 1),
    "olora": lambda: OneWeight("olora", "olora", (4096, 4096), "decaying", 40),
    "corda": lambda: CorDA("corda ipm, after the data", (1024, 4096), 8),
    "corda_kpm": lambda: CorDA("corda kpm, after the data", (1024, 4096), 5, method="kpm"),
    "corda_whole": lambda: CorDA("corda ipm, with 2048 tokens", (1024, 4096), 1, whole=True),
    "eva": lambda: EVA(1024, 0.25, 3),
    "eva_steep": lambda: EVA(1024, 1.0, 1),
    "loftq": lambda: LoftQ("loftq, 4 bits, 5 iterations", (1024, 4096), 7),
}


# -- measuring ---------------------------------------------------------------------------------


def time_of(case: Case, ours: bool) -> tuple[float, Any]:
    job = case.job(ours)
    began = time.perf_counter()
    result = job()
    return time.perf_counter() - (case.began or began), result


def compare(case: Case, seconds: float, turns: int) -> dict[str, Any]:
    """By turns, ours first, then theirs, until enough of either; the median of the pairwise ratios, and both errors."""
    ratios: list[float] = []
    began, errors = time.perf_counter(), (0.0, 0.0)
    while not ratios or (len(ratios) < turns and time.perf_counter() - began < seconds):
        (ours, mine), (theirs, other) = time_of(case, ours=True), time_of(case, ours=False)
        ratios.append(theirs / ours)
        if len(ratios) == 1:
            errors = case.error(mine), case.error(other)
    return {
        "speed": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "turns": len(ratios),
        "error": errors[0],
        "peer_error": errors[1],
    }


def peak(key: str, ours: bool, quick: bool, queue: Any) -> None:
    """In a process of its own: the peak of the resident set during the job above that before it, in W's size."""
    global QUICK
    QUICK = quick
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    threadpool_limits(1)
    small = CASES[key]
    warm_up(key)
    case = small()
    job = case.job(ours)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    job()
    bytes_of_W = case.W.nbytes if hasattr(case, "W") else 4 * case.width**2 * 8
    queue.put((resident("VmHWM") - before) / bytes_of_W)


def warm_up(key: str) -> None:
    """Load the libraries that the first call loads."""
    a = torch.randn(64, 64)
    torch.linalg.svd(a), torch.linalg.qr(a), numerics.leading_svd(torch.randn(600, 600), 4), numerics.svd(a.numpy())


def resident(what: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return int(re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024  # type: ignore[union-attr]


def memory(key: str, ours: bool) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak, args=(key, ours, QUICK, queue))
    process.start()
    process.join(timeout=900)
    if process.exitcode != 0:
        raise RuntimeError(f"measuring the memory of {key!r} failed, see above")
    return queue.get()


def steps(keys: list[str], threads: list[int]) -> Iterator[tuple[str, int | None]]:
    for key in keys:
        yield from ((key, n) for n in threads)
        yield key, None


# -- showing -----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model.group(1) if model else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "peft": peft.__version__,
        "lora_ref": lora_ref.__version__,
    }


def markdown(results: dict[str, Any]) -> str:
    """The table that page 4 quotes."""
    threads = [f"times faster, {n} thread{'s' * (n != 1)}" for n in results["threads"]]
    head = ["case", "W", *threads, "bar", "error", "peer's error", "memory / W", "peer's"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * 2 + " ---: |" * (len(head) - 2)]
    for row in results["cases"].values():
        speeds = [f"{row['threads'][str(n)]['speed']:.3g}" for n in results["threads"]]
        first = row["threads"][str(results["threads"][0])]
        numbers = [f"{row['bar']:g}", f"{first['error']:.1e}", f"{first['peer_error']:.1e}"]
        used = [f"{row['memory']:.2f}", f"{row['peer_memory']:.2f}"]
        lines.append("| " + " | ".join([row["name"], row["size"], *speeds, *numbers, *used]) + " |")
    said = [f"- {row['name']}: against {row['peer']}; error: {row['error_of']}" for row in results["cases"].values()]
    m = results["machine"]
    where = f"{m['cpu']}, {m['cores']} cores; torch {m['torch']}, scipy {m['scipy']}, peft {m['peft']}"
    note = "\n\nr = 16, float32. Speed: the peer's time over ours, median of the turns; memory at one thread.\n\n"
    return f"# Initialisations\n\n{where}.\n\n" + "\n".join(lines) + note + "\n".join(said) + "\n"


def main(arguments_given: list[str] | None = None) -> None:
    global QUICK
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of each dimension: under a minute")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--turns", type=int, default=5, help="at most so many of each (fewer of slow ones)")
    parser.add_argument("--out", type=Path, help="write init.json and init.md into this folder")
    arguments = parser.parse_args(arguments_given)
    QUICK = arguments.quick
    warnings.simplefilter("ignore")
    console = Console()
    results: dict[str, Any] = {"machine": machine(), "quick": QUICK, "threads": arguments.threads, "cases": {}}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        todo = list(steps(arguments.only, arguments.threads))
        task = progress.add_task("", total=len(todo))
        for key, n in todo:
            progress.update(task, description=f"{key}, {'memory' if n is None else f'threads: {n}'}")
            case = CASES[key]()
            shape = "x".join(map(str, case.W.shape)) if hasattr(case, "W") else f"{case.width}x{case.width}"
            row = results["cases"].setdefault(
                key,
                {"name": case.name, "peer": case.peer, "error_of": case.error_of, "size": shape, "bar": case.bar}
                | {"threads": {}},
            )
            if n is None:
                row |= {"memory": memory(key, ours=True), "peer_memory": memory(key, ours=False)}
            else:
                torch.set_num_threads(n)
                threadpool_limits(n)  # of NumPy's and SciPy's BLAS
                row["threads"][str(n)] = compare(case, 20, arguments.turns)
            progress.advance(task)
    show(results, console)
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        before = arguments.out / "init.json"
        if before.exists() and len(arguments.only) < len(CASES):  # --only renews its cases
            cases = json.loads(before.read_text(encoding="utf-8"))["cases"] | results["cases"]
            results["cases"] = {key: cases[key] for key in CASES if key in cases}
        (arguments.out / "init.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (arguments.out / "init.md").write_text(markdown(results), encoding="utf-8")
        console.print(f"written: {arguments.out / 'init.json'}, {arguments.out / 'init.md'}")


def show(results: dict[str, Any], console: Console) -> None:
    table = Table(title="Initialisations: the peer's time over ours")
    for title in (
        "case",
        "W",
        *(f"x{n} threads" for n in results["threads"]),
        "bar",
        "error",
        "peer's",
        "mem/W",
        "peer's",
    ):
        table.add_column(title, justify="left" if title in ("case", "W") else "right")
    for row in results["cases"].values():
        speeds = [row["threads"][str(n)]["speed"] for n in results["threads"]]
        first = row["threads"][str(results["threads"][0])]
        colour = "green" if results["quick"] or speeds[0] >= row["bar"] else "red"
        shown = [f"[{colour}]{s:.3g}[/]" for s in speeds]
        errors = [f"{first['error']:.1e}", f"{first['peer_error']:.1e}"]
        used = [f"{row['memory']:.2f}", f"{row['peer_memory']:.2f}"]
        table.add_row(row["name"], row["size"], *shown, f"{row['bar']:g}", *errors, *used)
    console.print(table)


if __name__ == "__main__":
    main()
