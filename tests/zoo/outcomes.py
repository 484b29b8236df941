"""The report of the zoo: results.json, results.md, and the cause of each outcome that is not "right"."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stamp import stamp

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "results.json", HERE / "results.md"
SOURCES = ("lora_ref", "tests/zoo/examine.py", "tests/zoo/tiny.py", "tests/zoo/classes.json")
LIBRARIES = ("transformers", "peft", "torch")
FAMILIES = ("text", "vision", "audio", "multimodal", "other")
#: The steps of `examine`, and what each of them shows.
CHECKS = {
    "start": "a new adapter gives the output of the base model, bit for bit",
    "gradients": "those layers are trained whose weights have a gradient in the base model, and no others",
    "acts": "a trained adapter changes the output",
    "off": "in `disable_adapter` the output is the base model's, bit for bit",
    "file": "the saved folder, loaded on a copy of the base model, gives the same output, bit for bit",
    "PEFT": "the saved folder, loaded by PEFT, gives the same output but for rounding",
    "merged": "after `merge_adapter` the output is the same but for rounding",
    "unmerged": "after `unmerge_adapter` the output is the same, bit for bit",
    "unloaded": "after `unload` the base model is there, bit for bit",
    "merged and unloaded": "after `merge_and_unload` the output is the same but for rounding",
}


@dataclass(frozen=True)
class Cause:
    """Why some classes have an outcome that is not "right"."""

    step: str
    says: str  # how the outcome begins
    classes: tuple[str, ...]
    why: str


OTHER = "PEFT reads another model"
CAUSES = (
    Cause(
        "PEFT",
        OTHER,
        (
            *("AfmoeForCausalLM", "BeamForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM"),
            *("Ernie4_5_MoeForCausalLM", "ExaoneMoeForCausalLM", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM"),
            *("GlmMoeDsaForCausalLM", "SolarOpenForCausalLM"),
        ),
        "transformers 5 has the experts as raw parameters. PEFT takes `gate_proj`, `up_proj` and `down_proj` of the "
        "dense layers for them, and adapts the experts in their place. A warning names `exclude_modules`: with it PEFT "
        "reads the folder rightly.",
    ),
    Cause(
        "PEFT",
        OTHER,
        ("LagunaForCausalLM", "MistralLarge4ForConditionalGeneration", "MistralLarge4TextModel"),
        "PEFT adapts the dense layers, but fuses their tensors in the file as if they were the experts'. It misreads "
        "its own folders, too. A warning names `exclude_modules`: with it PEFT reads the folder rightly.",
    ),
    Cause(
        "PEFT",
        OTHER,
        ("MaskFormerModel",),
        "transformers renames the layers of a Swin backbone (`attention.self.query` is `attention.q_proj`). "
        "MaskFormer's backbone has the old names, and PEFT renames them in the file all the same. It misreads its own "
        "folders, too. Without its renaming it reads this one rightly.",
    ),
    Cause(
        "PEFT",
        "NotImplementedError: `get_input_embeddings`",
        ("FlavaForPreTraining",),
        "The model has no `get_input_embeddings`, which PEFT calls to find tied weights. So PEFT cannot adapt it.",
    ),
    Cause(
        "refused",
        "nothing to adapt: target_modules='all-linear'",
        ("PPOCRV5MobileDetForObjectDetection", "UperNetForSemanticSegmentation"),
        "The model has convolutions and norms, but no linear layer. `target_modules` can name the convolutions.",
    ),
)


def sources() -> str:
    return stamp(SOURCES)


def versions() -> dict[str, str]:
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


def wrong(row: dict[str, Any]) -> dict[str, str]:
    """{step: outcome} of a class where it is not "right"."""
    return {key: row[key] for key in (*CHECKS, "refused", "base", "error") if row.get(key, "right") != "right"}


def cause(name: str, step: str, outcome: str) -> Cause | None:
    """What explains this outcome of a class."""
    found = [c for c in CAUSES if name in c.classes and c.step == step and outcome.startswith(c.says)]
    return found[0] if found else None


def unexplained(results: dict[str, Any]) -> list[str]:
    """Outcomes without a cause."""
    rows = results["classes"].items()
    bad = [(name, step, said) for name, row in rows for step, said in wrong(row).items()]
    return [f"{name}: {step}: {said}" for name, step, said in bad if cause(name, step, said) is None]


def summary(results: dict[str, Any]) -> str:
    """The totals in a few lines."""
    rows = results["classes"]
    bad = {name: wrong(row) for name, row in rows.items() if wrong(row)}
    lines = [f"{len(rows) - len(bad)} of {len(rows)} classes are right in every step"]
    for why in CAUSES:
        if there := [name for name in why.classes if name in bad]:
            lines.append(f"{len(there)} for a known cause: {why.step}: {why.says}")
    lost = unexplained(results)
    return "\n".join([*lines, *lost, f"{len(lost)} without a known cause"])


def totals(results: dict[str, Any]) -> list[list[str]]:
    """A row of numbers for each family, and one for all."""
    made = []
    for family in (*FAMILIES, "in all"):
        rows = [row for row in results["classes"].values() if family in (row["family"], "in all")]
        counts = [len(rows), sum(not wrong(row) for row in rows), sum(row.get("PEFT") == "right" for row in rows)]
        counts += [sum(row.get(key, 0) for row in rows) for key in ("layers", "reached")]
        made += [[family, *(f"{n:,}" for n in counts)]] if rows else []
    return made


def write(results: dict[str, Any]) -> None:
    """Both files; a class is a line of results.json."""
    rows = [f'  "{name}": {json.dumps(row)}' for name, row in results["classes"].items()]
    head = json.dumps({key: results[key] for key in ("sources", "versions")}, indent=1).removesuffix("\n}")
    RESULTS.write_text(f'{head},\n "classes": {{\n' + ",\n".join(rows) + "\n }\n}\n", encoding="utf-8")
    TABLE.write_text(page(results), encoding="utf-8")


def read() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text(encoding="utf-8")))


def page(results: dict[str, Any]) -> str:
    """The report as Markdown."""
    return "\n".join(lines(results)) + "\n"


def lines(results: dict[str, Any]) -> Iterator[str]:
    rows = results["classes"]
    bad = {name for name, row in rows.items() if wrong(row)}
    yield "# Model classes of transformers"
    yield "\n`make zoo` writes this page. Each class is built with a tiny configuration and random weights. Its linear"
    yield 'layers are adapted (`target_modules="all-linear"`), and the adapter is trained for one step.'
    made = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    yield f"\nWith {made}: {len(rows) - len(bad)} of {len(rows)} classes are right in every step."
    yield "\n| step | right, if |\n| --- | --- |"
    yield from (f"| {step} | {what} |" for step, what in CHECKS.items())
    yield "\n*layers* are adapted. *reached* are those whose weight has a gradient for the input of this run: text"
    yield "alone does not reach the vision tower of a multimodal model, a decoder alone no attention to an encoder, and"
    yield "not every token every expert."
    yield "\n## What is not right, and why\n"
    for why in CAUSES:
        there = ", ".join(f"`{name}`" for name in why.classes if name in rows)
        yield f"- **{why.step}: {why.says}.** {why.why} {there}."
    counts = Counter(row["family"] for row in rows.values())
    for family in FAMILIES:
        if not counts[family]:
            continue
        yield f"\n## {family.capitalize()}: {counts[family]}\n"
        yield f"| class | layers | reached | {' | '.join(CHECKS)} |"
        yield f"| --- | ---: | ---: |{' --- |' * len(CHECKS)}"
        for name, row in rows.items():
            if row["family"] == family:
                said = wrong(row)
                counted = [str(row.get(key, "none")) for key in ("layers", "reached")]
                whole = next((f"{key}: {said[key]}" for key in ("refused", "base", "error") if key in said), "")
                cells = [clean(said[s]) if s in said else "ok" if s in row else "not run" for s in CHECKS]
                if whole:
                    cells[0] = clean(whole)
                yield f"| {name} | {' | '.join([*counted, *cells])} |"


def clean(text: str) -> str:
    """In a cell of a table, shortened at the first colon of a long message."""
    short = text if len(text) < 60 else text.split("; ")[0].split(" match none")[0]
    return short.replace("|", "\\|")
