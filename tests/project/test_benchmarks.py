"""The benchmarks: what they count is right, what they write is whole; how long anything takes is not tested."""

import json
import re
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import __main__, against, init, measure, report, steps  # noqa: E402
from spec_tests import close  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """All themes at sizes at which nothing is measured."""
    folder = tmp_path_factory.mktemp("bench")
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        results = __main__.main(["--tiny", "--trim", "--out", str(folder)])
    torch.set_num_threads(threads)
    return results, folder


def test_every_theme_is_measured_and_written(tiny: tuple[dict[str, Any], Path]) -> None:
    results, folder = tiny
    assert json.loads((folder / "bench-quick.json").read_text()) == results
    page = (folder / "bench-quick.md").read_text()
    assert page == report.markdown(results, "bench-quick.png")
    assert (folder / "bench-quick.png").read_bytes().startswith(b"\x89PNG")
    assert len({row["theme"] for row in results["rows"]}) >= len(__main__.THEMES)
    for row in results["rows"]:
        assert f"## {row['theme']}\n" in page and report.said(row["about"]) in page
        assert row["ratios"][row["floor"]]["median"] == 1
        for name, ratio in row["ratios"].items():
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"], name
            assert f"| {name} |" in page
        for bar in row["bars"]:
            assert bar["kept"] == (bar["value"] <= bar["at_most"]) and f"| {bar['text']} |" in page


def test_another_checkout_takes_the_place_of_peft(capsys: pytest.CaptureFixture[str]) -> None:
    threads, libraries = torch.get_num_threads(), dict(steps.LIBRARIES)
    with warnings.catch_warnings():
        found = against.main([str(ROOT), "--tiny", "--only", "mixed"])
    torch.set_num_threads(threads)
    assert [case.rpartition(": ")[2] for case, _, _ in found] == ["lora_ref 8 loaded", "lora_ref 32 loaded"]
    assert all(0 < ratio["low"] <= ratio["median"] <= ratio["high"] and turns == 2 for _, turns, ratio in found)
    assert libraries == steps.LIBRARIES
    assert "8 loaded" in capsys.readouterr().out
    another = sys.modules["another"].get_peft_model
    assert another is not libraries["lora_ref"].get_peft_model and another.__module__.startswith("another.")


def test_a_folder_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="holds no package lora_ref: give the root of a checkout"):
        against.main([str(tmp_path), "--tiny"])


def test_nothing_names_the_machine(tiny: tuple[dict[str, Any], Path]) -> None:
    for text in [
        (tiny[1] / "bench-quick.json").read_text(),
        *(path.read_text() for path in RESULTS.glob("bench.*[dn]")),
    ]:
        assert socket.gethostname() not in text and str(Path.home()) not in text and str(ROOT) not in text


def test_bytes_are_counted(tiny: tuple[dict[str, Any], Path]) -> None:
    """z, and one byte for each element of x, is what the layer keeps; PEFT keeps x twice more and z."""
    row = next(row for row in tiny[0]["rows"] if row["theme"] == "Training step of one Linear")
    tokens, n_in, r = row["about"]["tokens"], row["about"]["in"], 8
    assert row["saved"]["frozen"] == row["saved"]["full"] == 0
    assert row["saved"]["lora_ref r=8 p=0"] == row["saved"]["PEFT r=8 p=0"] == 4 * r * tokens
    assert row["saved"]["lora_ref r=8 p=0.1"] == 4 * r * tokens + n_in * tokens
    assert row["saved"]["PEFT r=8 p=0.1"] == 4 * r * tokens + 8 * n_in * tokens


def test_the_peak_is_of_what_is_held_at_once() -> None:
    x = torch.ones(1000)

    def job() -> None:
        for _ in range(3):
            y = x + 1  # 4000 bytes, freed when the next one is there
        del y

    assert 8000 <= measure.peak_bytes(job, "cpu") < 9000


def test_jobs_run_by_turns() -> None:
    """At least five turns, whatever the time; a fresh job each turn where asked for; ratios of the same turn."""
    calls: list[str] = []

    def prepare(name: str) -> measure.Prepare:
        def made() -> measure.Job:
            calls.append(f"prepare {name}")
            return lambda: calls.append(name) or sum(range(100_000))

        return made

    case = measure.Case("theme", {"size": 1}, {n: prepare(n) for n in "ab"}, floor="a", fresh=True)
    row = measure.run(case, seconds=0, turns=41)
    assert row["turns"] == 5 and row["ratios"]["a"] == {"median": 1, "low": 1, "high": 1}
    turns = [calls[i : i + 4] for i in range(len(calls) - 20, len(calls), 4)]
    assert all(sorted(turn) == ["a", "b", "prepare a", "prepare b"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) == 2  # in both orders


@pytest.mark.parametrize("ours", [True, False], ids=["lora_ref", "peft"])
def test_the_error_of_an_initialisation_is_that_of_its_frozen_weight(ours: bool) -> None:
    """residual + s B A is W: R products, a sum and a residual are rounded. |B| has R columns of norm 1, |A| <= |W|."""
    case = init.OneWeight("olora", "olora", (256, 256), "decaying", bar=1.0)
    close(case.error(case.job(ours)()), 0.0, terms=init.R + 2, size=1 + 2 * init.R**0.5, dtype="float32")


def test_the_error_of_loftq_is_that_of_its_quantised_weight_and_its_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways have the same table, so W - Q - s B A is about the same: a part of the error of 4 bits alone."""
    monkeypatch.setattr(init, "QUICK", True)
    case = init.LoftQ("loftq", (256, 512), bar=1.0)
    ours, theirs = (case.error(case.job(ours)()) for ours in (True, False))
    alone = init.relative(case.W - init.loftq_by_table(case.W, 0, bits=4, iterations=1), case.W)
    assert 0.5 * alone < min(ours, theirs) <= max(ours, theirs) < alone
    assert abs(ours - theirs) < 0.05 * alone


def test_the_committed_results_are_of_the_versions_in_the_constraints() -> None:
    constraints = dict(re.findall(r"^([\w.-]+)==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    results = json.loads((RESULTS / "bench.json").read_text())
    for machine in results["machines"]:
        assert all(machine[name] == constraints[name] for name in ("peft", "loralib", "transformers"))
        assert machine["torch"].split("+")[0] == constraints["torch"]
    assert {row["machine"] for row in results["rows"]} == set(range(len(results["machines"])))
    assert not results["quick"] and all(row["turns"] >= 5 for row in results["rows"])
    assert {row["theme"] for row in results["rows"]} >= {"Training step of one Linear", "A batch that mixes adapters"}
    assert (RESULTS / "bench.md").read_text() == report.markdown(results)


def test_what_is_not_measured_stays_with_the_machine_it_is_of(tmp_path: Path) -> None:
    def row(of: str, dtype: str | None, ratio: float) -> dict[str, Any]:
        one, other = ({"median": r, "low": r, "high": r} for r in (1.0, ratio))
        about = {"in": 768} | ({"dtype": dtype} if dtype else {})
        row = {"of": of, "machine": 0, "theme": of, "about": about, "floor": "PEFT", "turns": 5}
        return row | {"ratios": {"PEFT": one, "lora_ref": other}, "computed": {}, "bars": []}

    options = __main__.parse(["--only", "steps", "--out", str(tmp_path)])
    options.allocator = "default"
    there, here = ({**__main__.machine.describe(options), "cpu": name} for name in ("there", "here"))
    options.dtypes = [torch.float32, torch.bfloat16]
    rows = [row("steps", "float32", 0.5), row("steps", "bfloat16", 0.6), row("models", None, 0.7)]
    __main__.write({"machines": [there], "quick": False, "rows": rows}, options)
    options.dtypes = [torch.float32]
    __main__.write({"machines": [here], "quick": False, "rows": [row("steps", "float32", 0.8)]}, options)
    results = json.loads((tmp_path / "bench.json").read_text())
    found = [(r["ratios"]["lora_ref"]["median"], results["machines"][r["machine"]]["cpu"]) for r in results["rows"]]
    assert found == [(0.8, "here"), (0.6, "there"), (0.7, "there")]
    page = (tmp_path / "bench.md").read_text()
    assert "Machine 1: CPU: here" in page and "Machine 2: CPU: there" in page and "(5 turns, machine 2)" in page
