"""Model classes of transformers, tiny and random: is each adapted, trained, merged, saved and loaded rightly?

    python tests/zoo/zoo.py                    every class in classes.json; writes results.json and results.md
    python tests/zoo/zoo.py --only llama t5    these; writes nothing
    python tests/zoo/zoo.py --find             try every class of transformers, and write classes.json

What is tried is in examine.py, the models are in tiny.py. Each class runs in a process of its own, so that a crash of
one does not end the others.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent), str(HERE)]
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

import examine  # noqa: E402
import outcomes  # noqa: E402
import tiny  # noqa: E402

from lora_ref.safe.progress import progress_bar  # noqa: E402

CLASSES = HERE / "classes.json"
SECONDS = 180  # for one class

# the first of these heads that a family has
HEADS = (
    *("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForSequenceClassification"),
    *("ForImageClassification", "ForCTC", "ForAudioClassification", "ForObjectDetection", "ForSemanticSegmentation"),
    *("ForDepthEstimation", "ForPreTraining", "ForVideoClassification", "ForTokenClassification", "Model"),
)


def inside(name: str, find: bool, pipe: Any) -> None:
    """One class, in this process; sends a dict."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.alarm(SECONDS)
    try:
        pipe.send({"runs": examine.runs(name)} if find else examine.examine(name))
    except Exception as error:  # of any model, and any library
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        pipe.send({"family": tiny.family(name), "error": said})


def outside(names: list[str], find: bool, jobs: int) -> dict[str, dict[str, Any]]:
    """Each class in a fork of this process, which has the libraries and the classes imported; so many at a time."""
    import peft  # noqa: F401
    import transformers

    for name in names:
        with contextlib.suppress(ImportError):  # the fork tells it
            getattr(transformers, name)
    context, waiting, found = multiprocessing.get_context("fork"), list(reversed(names)), {}
    running: dict[str, tuple[Any, Any]] = {}
    with progress_bar() as bar:
        task = bar.add_task("zoo", total=len(names))
        while waiting or running:
            while waiting and len(running) < jobs:
                name, (ours, theirs) = waiting.pop(), context.Pipe(duplex=False)
                process = context.Process(target=inside, args=(name, find, theirs))
                process.start()
                theirs.close()
                running[name] = process, ours
            ready = multiprocessing.connection.wait([pipe for _, pipe in running.values()])
            for name, (process, pipe) in [(n, pair) for n, pair in running.items() if pair[1] in ready]:
                try:
                    found[name] = pipe.recv()
                except EOFError:
                    process.join()
                    late = process.exitcode == -signal.SIGALRM
                    said = f"more than {SECONDS} seconds" if late else f"exit code {process.exitcode}"
                    found[name] = {"family": tiny.family(name), "error": said}
                process.join()
                pipe.close()
                del running[name]
                bar.advance(task)
    return {name: found[name] for name in names}


def candidates() -> list[str]:
    """For each family of transformers the class with the first head in HEADS that it has."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    by_config: dict[str, list[str]] = {}
    for name in dir(transformers):
        cls = getattr(transformers, name, None) if name.endswith(HEADS) and not name.startswith("Auto") else None
        with contextlib.suppress(ImportError):  # it needs a library that is not here
            if isinstance(config := getattr(cls, "config_class", None), type):
                by_config.setdefault(config.__name__, []).append(name)
    known = set(CONFIG_MAPPING_NAMES.values())
    first = {c: next((n for head in HEADS for n in names if n.endswith(head)), None) for c, names in by_config.items()}
    return sorted(name for c, name in first.items() if name and c in known)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--find", action="store_true", help="which classes build and run")
    options.add_argument("--only", nargs="+", default=[], help="classes whose names contain one of these")
    options.add_argument("--jobs", type=int, default=2, help="at a time (default: 2)")
    options.add_argument("--check", action="store_true", help="leave the reports as they are")
    given = options.parse_args()
    names = candidates() if given.find else json.loads(CLASSES.read_text(encoding="utf-8"))
    names = [n for n in names if not given.only or any(word.lower() in n.lower() for word in given.only)]
    print(f"{len(names)} classes of transformers, each tiny and random: {'which run' if given.find else 'examine.py'}")
    began, sources = time.monotonic(), outcomes.sources()  # what is edited during the run has not been tried
    found = outside(names, given.find, given.jobs)
    writes = not (given.only or given.check)
    if given.find:
        kept = [name for name, row in found.items() if row.get("runs")]
        print("\n".join(f"{name}: {row.get('error', 'left out')}" for name, row in found.items() if name not in kept))
        print(f"{len(kept)} of {len(found)} classes build and run")
        if writes:
            CLASSES.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        return 0
    results = {"sources": sources, "versions": outcomes.versions(), "classes": found}
    print(outcomes.summary(results))
    if writes:
        outcomes.write(results)
        print("tests/zoo/results.json and results.md are written; make readme renews the table of tests/README.md")
    print(f"{time.monotonic() - began:.0f} seconds")
    return int(bool(outcomes.unexplained(results)))


if __name__ == "__main__":
    sys.exit(main())
