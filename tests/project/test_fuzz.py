"""The inputs that fuzzing has kept, and a short run of the fuzzer itself: LORA_REF_FUZZ seconds for each reader."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "fuzz"
SECONDS = int(os.environ.get("LORA_REF_FUZZ", "4"))


def runner():
    spec = importlib.util.spec_from_file_location("fuzz_run", HERE / "fuzzing.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = runner()


@pytest.mark.parametrize("target", run.TARGETS)
def test_every_input_that_was_kept_is_read_or_refused_and_changes_nothing(target: str) -> None:
    one = run.make(target)
    kept = sorted((HERE / "corpus" / target).iterdir())
    assert len(kept) > 50
    for data in [*run.seeds(target), *(path.read_bytes() for path in kept)]:
        one(data)


def test_a_finding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that do what they must not are noticed by the same functions."""
    config, folder, valid = run.make("config"), run.make("folder"), run.seeds("config")[0]
    monkeypatch.setattr("lora_ref.files.config_file.dumps", lambda config: '{"peft_type": "LORA", "r": 3}')
    with pytest.raises(AssertionError, match="what was read is not what is written"):
        config(valid)
    monkeypatch.undo()

    def careless(net, place):
        net["q"].weight.data.add_(1)
        raise ValueError("too late")

    monkeypatch.setattr("lora_ref.PeftModel.from_pretrained", careless)
    with pytest.raises(AssertionError, match=r"refused, and q\.weight has changed"):
        folder(b"")


@pytest.mark.skipif(sys.platform != "linux", reason="atheris is made for Linux")
@pytest.mark.parametrize("target", run.TARGETS)
def test_a_while_of_fuzzing_finds_nothing(target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "MOST", 0)  # the corpus stays as it is committed
    made = run.run(target, seconds=SECONDS)
    assert made["findings"] == 0 and made["executions"] > 10 * SECONDS


def test_the_committed_run_was_long_and_found_nothing() -> None:
    results = json.loads((HERE / "results.json").read_text())
    assert results.keys() == set(run.TARGETS)
    assert sum(made["seconds"] for made in results.values()) >= 3600
    assert all(made["findings"] == 0 and made["executions"] > 10_000 for made in results.values())
