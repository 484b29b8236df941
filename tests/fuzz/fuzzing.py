"""Coverage-guided fuzzing of what reads adapter folders: `python tests/fuzz/fuzzing.py [TARGET] [--seconds 60]`.

atheris changes bytes, keeps what reaches new code of lora_ref, and goes on from there. An input is survived if it
is read, or refused with ValueError or OSError and the model is bit for bit as it was. The corpus, in tests/fuzz/corpus,
is what reached new code; results.json says how much was tried. Needs `pip install -e '.[test]'`, on Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGETS = ("config", "folder")
MARK = b"\x00--\x00"  # between the configuration and the tensors of a folder, in one input


def make(target: str) -> Callable[[bytes], None]:
    """The function that takes an input, and raises what is a finding."""
    import torch

    from lora_ref import LoraConfig, PeftModel
    from lora_ref.files import config_file

    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    config, weights = place / "adapter_config.json", place / "adapter_model.safetensors"

    def model() -> Any:
        torch.manual_seed(0)
        return torch.nn.ModuleDict({"emb": torch.nn.Embedding(4, 2), "q": torch.nn.Linear(2, 2)})

    def state(net: Any) -> dict[str, Any]:
        return {name: (type(module).__name__, dict(module.named_parameters())) for name, module in net.named_modules()}

    def config_of(data: bytes) -> None:
        config.write_bytes(data)
        with contextlib.suppress(ValueError, OSError):
            found = config_file.read(config)
            again = config_file.from_dict(json.loads(config_file.dumps(found)))
            assert isinstance(found, LoraConfig) and again == found, "what was read is not what is written"

    def folder_of(data: bytes) -> None:
        first, _, second = data.partition(MARK)
        config.write_bytes(first)
        weights.write_bytes(second)
        net = model()
        before, names = state(net), [name for name, _ in net.named_modules()]
        copies = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        try:
            adapted = PeftModel.from_pretrained(net, place)
        except (ValueError, OSError):
            assert [name for name, _ in net.named_modules()] == names, "refused, and other modules than before"
            assert state(net).keys() == before.keys()
            for name, parameter in net.named_parameters():
                assert torch.equal(parameter, copies[name]), f"refused, and {name} has changed"
        else:
            assert all(torch.isfinite(p).all() for p in adapted.parameters()), "a number that is not finite was loaded"

    chosen = {"config": config_of, "folder": folder_of}[target]

    def one(data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen(data)

    return one


def seeds(target: str) -> list[bytes]:
    """Valid inputs to begin with."""
    import torch

    from lora_ref import LoraConfig, get_peft_model

    found = []
    for options in (
        {"target_modules": ["q"]},
        {"target_modules": ["q", "emb"], "rank_pattern": {"q": 1}, "alpha_pattern": {".*q": 3}, "use_rslora": True},
        {"target_modules": "q|emb", "bias": "all"},
        {"target_modules": ["emb"], "modules_to_save": ["q"], "layers_to_transform": None},
        {"target_modules": ["q"], "init_lora_weights": "pissa"},
    ):
        net = torch.nn.ModuleDict({"emb": torch.nn.Embedding(4, 2), "q": torch.nn.Linear(2, 2)})
        with tempfile.TemporaryDirectory() as place:
            get_peft_model(net, LoraConfig(r=2, **options)).save_pretrained(place)
            config = Path(place, "adapter_config.json").read_bytes()
            tensors = Path(place, "adapter_model.safetensors").read_bytes()
        found.append(config if target == "config" else config + MARK + tensors)
    return found


def vocabulary() -> list[str]:
    """Words of configurations and of safetensors' headers, quoted as libFuzzer wants them."""
    from dataclasses import fields

    from lora_ref import LoraConfig
    from lora_ref.files.config_file import OFF_IN_PEFT
    from lora_ref.init import METHODS

    keys = [
        *(field.name for field in fields(LoraConfig)),
        *OFF_IN_PEFT,
        "dtype",
        "shape",
        "data_offsets",
        "__metadata__",
    ]
    values = [
        "true",
        "false",
        "null",
        "[]",
        "{}",
        "-1",
        "0",
        "1e999",
        "NaN",
        "(a|aa)+$",
        "\\ud800",
        "all-linear",
        "all",
        "lora_only",
    ]
    values += [name for name, method in METHODS.items() if method.changes_base]
    values += ["gaussian", "orthogonal", "eva", "mica", "F32", "F16", "BF16", "F64", "F8_E4M3", "I64"]
    values += ["base_model.model.q.lora_A.weight", "base_model.model.emb.lora_embedding_A", ".base_layer.bias"]
    quoted = (word.replace("\\", "\\\\") for word in [*(f'"{key}": ' for key in keys), *values])
    return [word.replace('"', '\\"') for word in quoted]


def fuzz(target: str, seconds: int, corpus: Path) -> None:
    """Run atheris in this process, which ends with it: a finding is a non-zero exit code and a file crash-*."""
    import atheris

    with atheris.instrument_imports(include=["lora_ref", "json", "safetensors"]):
        import lora_ref  # noqa: F401
    tried = make(target)
    words = corpus.with_suffix(".words")
    words.write_text("".join(f'"{word}"\n' for word in vocabulary()), encoding="utf-8")
    options = [f"-max_total_time={seconds}", f"-dict={words}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=4096"]
    shown = ["-print_final_stats=1", f"-artifact_prefix={HERE}/"]
    atheris.Setup([sys.argv[0], *options, *shown, str(corpus)], tried)
    atheris.Fuzz()


def run(target: str, seconds: int) -> dict[str, Any]:
    """Fuzz in a process of its own, put what reached new code into the corpus, and say how much was tried."""
    kept = HERE / "corpus" / target
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch)
        for index, data in enumerate([*seeds(target), *(path.read_bytes() for path in sorted(kept.iterdir()))]):
            (corpus / f"seed-{index}").write_bytes(data)
        line = [sys.executable, str(HERE / "fuzzing.py"), target, "--inside", str(corpus), "--seconds", str(seconds)]
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
        said = done.stderr + done.stdout
        if done.returncode:
            raise SystemExit(f"{target}: a finding, see {HERE}/crash-* or timeout-*\n{said[-4000:]}")
        executions = int(re.findall(r"stat::number_of_executed_units:\s+(\d+)", said)[0])
        first, last = (re.findall(r"cov: (\d+) ft: (\d+)", said)[index] for index in (0, -1))
        new = [path for path in corpus.iterdir() if not path.name.startswith("seed-")]
        for path in sorted(new, key=lambda path: (path.stat().st_size, path.name))[:MOST]:
            (kept / path.name).write_bytes(path.read_bytes())
    return {
        "seconds": seconds,
        "executions": executions,
        "edges of the seeds": int(first[0]),
        "edges in all": int(last[0]),
        "inputs that reached new code": len(new),
        "findings": 0,
        "atheris": importlib.metadata.version("atheris"),
    }


MOST = 150  # inputs that one run adds to the corpus, the shortest first


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the readers of adapter folders.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="config or folder; default: both")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(TARGETS)}")
    if options.inside:
        fuzz(options.targets[0], options.seconds, options.inside)
        return
    results = HERE / "results.json"
    made = json.loads(results.read_text()) if results.exists() else {}
    for target in options.targets or TARGETS:
        print(f"==> {target}: {options.seconds} s", flush=True)
        made[target] = run(target, options.seconds)
        print(json.dumps(made[target]), flush=True)
    results.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
