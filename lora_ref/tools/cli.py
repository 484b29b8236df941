"""The `lora-ref` command: `lora-ref demo`, `lora-ref inspect DIR`, `lora-ref check IMPL ...` and `lora-ref plan`.

Exit codes: 0 done, 1 an error (one sentence on standard error) or a failed check, 2 wrong usage, 130 interrupted.
Each subcommand imports its modules when it runs, so `--help` is fast.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: sys.argv[1:]) and return its exit code.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    lora-ref ...
    0
    """
    try:
        options = parser().parse_args(arguments)
    except SystemExit as stop:  # argparse ends so after --help, --version and wrong usage
        return int(stop.code or 0)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # "?" for a character that the terminal cannot show
    try:
        code = options.action(options)
        sys.stdout.flush()  # a closed pipe raises here, not at the end of the interpreter
        return code or 0
    except BrokenPipeError:
        # the reader closed the pipe, as in `lora-ref inspect DIR | head -1`: no message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, MemoryError) as error:
        text = "".join(c if c.isprintable() else " " for c in str(error))  # names in a file may be hostile
        sentence = " ".join(text.split()) or type(error).__name__
        print(f"lora-ref: error: {sentence}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("lora-ref: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The parser with all subcommands and options."""
    top = argparse.ArgumentParser(
        prog="lora-ref",
        description="LoRA, shown, inspected, checked and planned: a demo that trains adapters, a look into adapter "
        "folders, a conformance suite for any implementation, and what big models need.",
        epilog="lora-ref demo --help and the like say more.",
    )
    top.add_argument("--version", action="version", version=f"lora-ref {version()}")
    commands = top.add_subparsers(title="commands", metavar="{demo,inspect,check,plan}", required=True)

    demo = commands.add_parser(
        "demo",
        help="adapt a small network to rotated digits, next to full fine-tuning (ten seconds or so)",
        description="Train a small network on handwritten digits, watch it fail on digits turned by 90 degrees, "
        "and adapt it with LoRA at several ranks and with full fine-tuning. The adapter of the highest rank is "
        "saved, loaded again and merged. Needs pip install 'lora_ref[demo]'; no network, no GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--out", type=Path, default=Path("lora_ref_demo"), metavar="DIR", help="where to write")
    demo.add_argument("--seed", type=seed, default=0, metavar="N", help="the same seed gives the same numbers")
    demo.add_argument("--quick", action="store_true", help="fewer epochs, and ranks 2 and 8 only")
    demo.add_argument(
        "--r",
        type=number(int, 1, 256),
        nargs="+",
        metavar="R",
        default=argparse.SUPPRESS,
        help="ranks (default: 1 2 4 8)",
    )
    demo.add_argument("--lora-alpha", type=float, default=8.0, metavar="A", help="s = lora_alpha / r")
    demo.set_defaults(action=run_demo)

    inspect = commands.add_parser(
        "inspect",
        help="what is in an adapter folder: ranks, scalings, and the singular values of every update",
        description="For each adapted module of an adapter folder, as PEFT or lora_ref wrote it: rank, alpha, "
        "scaling, shapes, and the Frobenius norm and the singular values of its update s*B*A.",
    )
    inspect.add_argument("directory", type=Path, metavar="DIR", help="a folder with adapter_config.json")
    inspect.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    inspect.add_argument("--figure", type=Path, metavar="PNG", help="also draw the singular values to this file")
    inspect.set_defaults(action=run_inspect)

    check = commands.add_parser(
        "check",
        help="try an implementation of LoRA, this one or another, on the requirements of spec_tests",
        description="Try implementations of LoRA on the requirements of spec_tests: one line for each area, and for "
        "each failure its sentence, the smallest example found and a script. Exit code 0: all that is claimed holds, "
        "or is a known deviation; 1: something fails. Needs pip install 'lora_ref[spec]'.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    check.add_argument(
        "implementations",
        nargs="*",
        metavar="IMPL",
        default=["lora_ref"],
        help="package.module:Class, or a bundled one: lora_ref, lora_ref_core, plain, peft, loralib, ...",
    )
    check.add_argument("--report", type=Path, metavar="JSON", help="write a report (a list, of several IMPL)")
    check.add_argument("--html", type=Path, metavar="HTML", help="write the matrix as one page")
    check.add_argument("--only", nargs="+", default=[], metavar="AREA", help="only these areas, or requirements")
    check.add_argument("--profile", choices=("quick", "default", "deep"), default="default", help="how many examples")
    check.add_argument("--seed", type=seed, metavar="N", help="other cases than the usual, the same for the same N")
    check.add_argument(
        "--jobs", type=number(int, 1, 1024), metavar="N", help="processes (default: as many as there are cores)"
    )
    check.add_argument("--list", action="store_true", help="list the requirements, and try nothing")
    check.set_defaults(action=run_check)

    plan = commands.add_parser(
        "plan",
        help="what training an adapter of a big model needs: memory by engine and number of GPUs, operations",
        description="Bytes for each GPU, and operations for each token, to train adapters of a Llama-like model: "
        "frozen weights in bfloat16, adapters in float32 with Adam, activation checkpointing. The formulas are in "
        "lora_ref/tools/plan.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole = number(int, 1, 10**9)
    plan.add_argument(
        "--params", type=number(float, 1, 1e15), default=8e9, metavar="N", help="weights of the model, such as 70e9"
    )
    plan.add_argument("--r", type=whole, default=16, metavar="R", help="rank of every adapter")
    plan.add_argument("--gpus", type=whole, nargs="+", default=[1, 2, 4, 8], metavar="N", help="numbers of GPUs")
    plan.add_argument("--tokens", type=whole, default=4096, metavar="N", help="tokens at a time on each GPU")
    plan.add_argument(
        "--context", type=number(int, 0, 10**9), default=4096, metavar="N", help="tokens that attend to each other"
    )
    plan.add_argument("--gpu-memory", type=number(float, 0, 1e6), default=80.0, metavar="GIB", help="what a GPU has")
    plan.set_defaults(action=run_plan)
    return top


def number(kind: type[int] | type[float], lowest: float, highest: float) -> Callable[[str], float]:
    """What reads an option's number, and says which are allowed.

    >>> number(int, 1, 256)("0")
    Traceback (most recent call last):
    ...
    argparse.ArgumentTypeError: 0: must be a whole number from 1 to 256
    """

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: must be {what} from {lowest:.15g} to {highest:.15g}")
        return value

    return read


seed = number(int, 0, 2**32 - 1)  # what the random generators accept


def version() -> str:
    """The installed version, or "(not installed)"."""
    try:
        return importlib.metadata.version("lora_ref")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def run_demo(options: argparse.Namespace) -> None:
    from .demo import show_demo

    show_demo(options.out, options.seed, options.quick, getattr(options, "r", None), options.lora_alpha)


def run_inspect(options: argparse.Namespace) -> None:
    from .inspect import print_contents

    print_contents(options.directory, options.json, options.figure)


def run_plan(options: argparse.Namespace) -> None:
    from .plan import print_plan

    print_plan(options.params, options.r, options.gpus, options.tokens, options.gpu_memory, options.context)


def run_check(options: argparse.Namespace) -> int:
    try:
        from spec_tests.command import Options, check
    except ModuleNotFoundError as error:
        raise ImportError(f"check needs {error.name}: pip install 'lora_ref[spec]'") from error
    given = vars(options)
    return check(Options(**{name: given[name] for name in Options.__dataclass_fields__}))
