"""What README.md says is so: the example's output, the links, the refusals, each number.

Nothing in README.md is generated, so that its source can be read, too. A number that has changed is named here.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import size
import torch

import lora_ref
from lora_ref import LoraConfig, PeftModel, get_peft_model
from lora_ref import init as inits
from lora_ref.files.config_file import OFF_IN_PEFT
from spec_tests import agree, distance, load, peers, report

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COG = re.compile(r"\[\[\[cog.*?\]\]\]", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = ("README.md", "SECURITY.md", "benchmarks/README.md", "tests/README.md", "spec_tests/README.md")


def test_a_newcomer_reads_it_to_the_end() -> None:
    assert len(README.splitlines()) <= 130
    assert "<!--" not in README


def test_the_example_prints_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (example,) = (code for kind, code in FENCE.findall(README) if kind == "python")
    printed = README.split("It prints:\n\n```text\n")[1].split("```")[0]
    with contextlib.redirect_stdout(said := io.StringIO()):
        exec(example, {})
    assert [line.rstrip() for line in said.getvalue().splitlines() if line.strip()] == printed.splitlines()
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    }


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, "tutorials/vi/README.md"])
def test_every_link_leads_somewhere(name: str) -> None:
    page, broken = ROOT / name, []
    for target in LINK.findall(COG.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))):
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if re.match(r"[a-z]+:", target):
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md"])
def test_generated_tables_are_up_to_date(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cogapp = pytest.importorskip("cogapp")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    with contextlib.redirect_stdout(said := io.StringIO()):
        assert cogapp.Cog().main(["cog", "-P", "--check", "--diff", name]) == 0, f"{said.getvalue()}\nmake readme"


# -- what is there, and what is not ----------------------------------------------------------------


def quoted(text: str) -> list[str]:
    return re.findall(r"`(\w+)`", text)


def test_the_options_that_are_not_there_are_refused_in_these_words() -> None:
    names = quoted(README.split("are not there:")[1].split(".")[0])
    assert set(names) == set(OFF_IN_PEFT)
    for name in names:
        with pytest.raises(ValueError, match=f"^{name}=True: is not supported"):
            LoraConfig(**{name: True})
        assert not getattr(LoraConfig(**{name: None}), name)
        assert name in peft.LoraConfig.__dataclass_fields__
    shown, said = re.search(r">>> (.*)\nValueError: (.*)\n", README).groups()
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        eval(shown, {"LoraConfig": LoraConfig})


def test_the_names_that_peft_has_more_are_so() -> None:
    names = quoted(README.split("PEFT has more, such as")[1].split("\n")[0])
    assert len(names) == 6
    for name in names:
        assert hasattr(peft, name) and not hasattr(lora_ref, name), name
    for name in ("LoraConfig", "get_peft_model", "PeftModel"):
        assert name in lora_ref.__all__ and hasattr(peft, name)


# -- numbers ----------------------------------------------------------------------------------------


def results(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def line_about(what: str) -> str:
    (line,) = re.findall(rf"^- \*\*{what}\.\*\* (.*)$", README, re.MULTILINE)
    return line


def integers(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", text)]


def test_size() -> None:
    stated = integers(line_about("Size").split(":")[1].split("[")[0])
    ours, theirs, core = size.of_lora_ref(), size.of_peft(), size.of_lora_ref("core")
    # the figures are of one commit: a change of a few lines needs no other README
    assert stated == pytest.approx([ours, core, theirs], rel=0.02), "python tests/size.py"
    assert f"{ours / theirs:.2f} times" in line_about("Size")


def test_speed() -> None:
    from benchmarks import report as bench

    worst: dict[str, float] = {
        bar["text"]: bar["worst"] for bar in bench.bars(results("benchmarks/results/bench.json"))
    }
    steps = {text: value for text, value in worst.items() if text.startswith("step") and "overhead" in text}
    at_8, at_64 = (max(value for text, value in steps.items() if f"r={r}," in text) for r in (8, 64))
    line = line_about("Speed")
    assert f"was {at_8:.2f} at rank 8. At rank 64 it was {at_64:.2f}." in line
    merge = worst["merge_adapter: time / PEFT's"]
    assert f"up to {merge:.2f} times PEFT's time" in line


def test_conformance() -> None:
    reports = [made for path in (peers.HERE / "reports").glob("*.json") for made in report.read(path)]
    counts = {made["implementation"]["name"]: made["footer"]["counts"] for made in reports}
    version = next(made["implementation"]["version"] for made in reports if made["implementation"]["name"] == "peft")
    total, ours, theirs = len(load()), counts["lora_ref"]["PASS"], counts["peft"]
    claimed = sum(theirs.values()) - theirs["UNSUPPORTED"]
    line = line_about("Conformance")
    assert f"keeps {ours} of the {total} requirements" in line
    assert (
        f"{claimed} of them concern features of {version.split(', ')[0].upper()}, and PEFT keeps {theirs['PASS']}."
        in line
    )
    assert f"on {len(reports)} implementations" in line


def test_models() -> None:
    rows = results("tests/zoo/results.json")["classes"].values()
    beside = ("family", "layers", "reached", "warnings", "PEFT")
    ours = [row for row in rows if {said for step, said in row.items() if step not in beside} == {"right"}]
    theirs = [row for row in rows if row.get("PEFT") == "right"]
    assert integers(line_about("Models").split("](")[0]) == [len(rows), len(ours), len(theirs)]


def test_versions() -> None:
    runs = results("tests/compat/results.json")["runs"]
    text = json.dumps(runs)
    first, last, oldest, newest = re.search(
        r"Python ([\d.]+) to ([\d.]+) with torch ([\d.]+) to ([\d.]+) ", line_about("Versions")
    ).groups()
    for version in (first, last, oldest, newest):
        assert f'"{version}"' in text
    torches = re.findall(r'"torch": "([\d.]+)', text)
    as_numbers = [tuple(map(int, version.split("."))) for version in torches]
    assert min(as_numbers) == tuple(map(int, oldest.split("."))) and max(as_numbers) == tuple(
        map(int, newest.split("."))
    )


# -- the initialisation that reading_order.md adds ----------------------------------------------------


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The function of the page, entered in METHODS by the lines of the page."""
    page = (ROOT / "tutorials" / "reading_order.md").read_text(encoding="utf-8").split("## Add an initialisation")[1]
    module, entry = (code for _, code in FENCE.findall(page))
    with pytest.raises(ValueError, match="init_lora_weights='columns': must be"):
        LoraConfig(init_lora_weights="columns")
    names: dict[str, Any] = {"__package__": "lora_ref.init", "__name__": "lora_ref.init.columns"}
    exec(module, names)
    monkeypatch.setitem(inits.METHODS, "columns", None)  # and taken out again afterwards
    exec(entry, vars(inits) | {"columns": names["columns"]})
    return names["columns"]


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_an_initialisation_of_ones_own_works_on_both_libraries(kind: str, columns: Any) -> None:
    W = np.random.default_rng(0).normal(size=(6, 8))
    weight = W if kind == "numpy" else torch.from_numpy(W)
    A, B, residual, _ = columns(weight, 2, 0.5)
    agree(residual + 0.5 * (B @ A), weight)
    assert int((abs(residual).sum(0) == 0).sum()) == 2


def test_an_initialisation_of_ones_own_trains_and_is_saved(tmp_path: Path, columns: Any) -> None:
    torch.manual_seed(0)
    base, x = torch.nn.Sequential(torch.nn.Linear(8, 6)).double(), torch.randn(3, 8, dtype=torch.float64)
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["0"], "init_lora_weights": "columns"}
    with pytest.raises(ValueError, match=r"0: init_lora_weights='columns' needs r <= min\(in, out\) = 6"):
        get_peft_model(copy.deepcopy(base), LoraConfig(**options | {"r": 7}))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**options))
    agree(model(x), base(x))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    assert distance(model(x), base(x)) > 1e-3
    model.save_pretrained(tmp_path)
    for library in (lora_ref, peft):
        agree(library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x), model(x))
    with model.disable_adapter():
        agree(model(x), base(x))


def test_peft_does_not_know_the_name_of_an_initialisation_that_leaves_the_base_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(inits.METHODS, "mine", inits.Method({"linear": inits.uniform}))
    base = torch.nn.Sequential(torch.nn.Linear(8, 6))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["0"], init_lora_weights="mine"))
    model.save_pretrained(tmp_path)
    assert isinstance(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path), PeftModel)
    with pytest.raises(ValueError, match="mine"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path)
    peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
