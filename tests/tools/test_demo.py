"""The demo, end to end: what it shows is true, and what it prints is what it measured."""

from __future__ import annotations

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lora_ref import PeftModel
from lora_ref.tools import cli, demo
from lora_ref.tools.demo import digits, experiment

UNIT = 2.0**-24  # float32's unit roundoff


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick demo: its folder, its results and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("COLUMNS", "80")
        assert cli.main(["demo", "--quick", "--out", str(out)]) == 0
    return out, json.loads((out / "results.json").read_text(encoding="utf-8")), printed.getvalue()


def rows(results, name):
    return [run for run in results["runs"] if run["name"] == name]


def test_the_base_fails_on_rotated_digits_and_lora_reads_them(quick):
    _, results, _ = quick
    (none,), lora, (full,) = rows(results, "none"), rows(results, "LoRA"), rows(results, "fine-tuning")
    assert none["upright_adapted"] > 0.9
    assert none["rotated_before"] < 0.3
    assert [run["rank"] for run in lora] == [2, 8]
    for run in lora:
        assert run["rotated_before"] == none["rotated_before"]  # B = 0: a new adapter changes nothing
        assert run["rotated_after"] > 0.75
        assert run["upright_adapted"] < none["upright_adapted"] - 0.2
        assert run["upright_disabled"] == none["upright_adapted"]  # switched off, it is the base
    assert full["rotated_after"] > 0.85 and full["upright_adapted"] < none["upright_adapted"]


def test_counts_and_scalings_are_those_of_the_formulas(quick):
    _, results, _ = quick
    for run in rows(results, "LoRA"):
        assert run["scaling"] == run["alpha"] / run["rank"]
        assert run["trainable"] == run["rank"] * ((64 + 256) + (256 + 256) + (256 + 10))
        assert run["percent"] == 100 * run["trainable"] / 85_002
        assert run["curve"][-1] == run["rotated_after"] and run["curve"][0] == run["rotated_before"]
        assert len(run["curve"]) == results["epochs"]["adaptation"] + 1


def test_the_table_prints_the_results(quick):
    out, results, printed = quick
    lines = printed.splitlines()
    assert max(map(len, lines[: lines.index(next(line for line in lines if "trainable params" in line))])) <= 80
    assert "…" not in printed
    for run in results["runs"]:
        lora = [f"{run[key]:g}" if run[key] else "–" for key in ("rank", "alpha", "scaling")]
        keys = ("rotated_before", "rotated_after", "upright_adapted", "upright_disabled")
        shares = ["–" if run[key] is None else f"{run[key]:.1%}" for key in keys]
        cells = [run["name"], *lora, f"{run['trainable']:,}", f"{run['percent']:.1f}%", *shares]
        assert [line.split() for line in lines].count(cells) == 1
    assert str(out) in printed.replace("\n", "")
    assert {path.name for path in out.iterdir()} == {"demo.png", "results.json", "adapter"}
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_reported_differences_are_within_derived_bounds(quick):
    """Reloading and switching off change no number; merging rounds each of W + s*B*A once, so is off by a few units."""
    out, results, _ = quick
    measured = results["measured"]
    assert measured["reloaded_vs_trained"] == 0
    assert measured["disabled_vs_base"] == 0
    assert 0 < measured["merged_vs_adapted"] <= 8 * UNIT * absolute_logits(out, results)
    assert measured["adapter_bytes"] == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    assert measured["adapter_bytes"] < measured["full_bytes"] / 5


def trained_base(results):
    """The base network of a run, which its seed determines."""
    upright = digits.load(results["seed"])
    with experiment.fixed_seed(results["seed"]):
        base = digits.Network()
    digits.train(base, upright, results["epochs"]["base"], experiment.BASE_RATE, results["seed"])
    return base, upright.rotated()


def absolute_logits(out, results):
    """The largest logit of the same network with every factor and every product replaced by its absolute value."""
    base, rotated = trained_base(results)
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    s = rows(results, "LoRA")[-1]["scaling"]
    x = rotated.test.double().flatten(1)
    for name in experiment.TARGETS:
        A, B = (stored[f"base_model.model.{name}.lora_{factor}.weight"].double().abs() for factor in "AB")
        layer = getattr(base, name)
        x = x @ (layer.weight.double().abs() + s * B @ A).T + layer.bias.double().abs()
    return x.max().item()


def test_the_saved_adapter_reads_rotated_digits(quick):
    out, results, _ = quick
    base, rotated = trained_base(results)
    model = PeftModel.from_pretrained(copy.deepcopy(base), str(out / "adapter"))
    assert digits.accuracy(model, rotated) == rows(results, "LoRA")[-1]["rotated_after"]


def test_the_same_seed_gives_the_same_numbers_over_the_same_files(quick, tmp_path):
    _, results, _ = quick
    for _ in range(2):  # the second run writes over the files of the first
        demo.show_demo(tmp_path, seed=results["seed"], quick=True, ranks=[8])
    again = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert rows(again, "LoRA") == rows(results, "LoRA")[-1:]  # a run does not depend on the runs before it
    assert again["measured"] == results["measured"]
    assert (tmp_path / "demo.png").exists()


def test_the_global_state_of_torch_and_numpy_is_left_alone(tmp_path):
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    demo.show_demo(tmp_path, seed=1, quick=True, ranks=[1])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
