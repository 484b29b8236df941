"""The Vietnamese pages are the English ones in other words: the same cells, formulas, figures and exercises."""

from __future__ import annotations

import pathlib
import re
import sys
from collections import Counter

import pytest

TUTORIALS = pathlib.Path(__file__).resolve().parents[2] / "tutorials"
jupytext = pytest.importorskip("jupytext", reason="needs pip install 'lora_ref[tutorials]'")

sys.path.insert(0, str(TUTORIALS))
from book import pages  # noqa: E402

TRANSLATED = ("01_one_layer", "02_scaling", "03_zero_factor", "06_targeting", "14_errata")
FENCE = re.compile(r"^```.*?^```\n", re.DOTALL | re.MULTILINE)
COG = re.compile(r"<!-- (\[\[\[cog.*?\]\]\]) -->.*?<!-- \[\[\[end\]\]\] -->\n", re.DOTALL)
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
WORDS = re.compile(r"\\text\{([^}]*)\}")


def cells(text: str) -> list[str]:
    return [cell.source for cell in jupytext.reads(text, fmt="md").cells if cell.cell_type == "code"]


def prose(text: str) -> str:
    """The text without header, cells and quotes of code."""
    return FENCE.sub("", COG.sub("", re.sub(r"\A---\n.*?^---\n", "", text, flags=re.DOTALL | re.MULTILINE)))


def formulas(text: str) -> Counter[str]:
    """Each formula and how often it is there; words inside of formulas may be translated."""
    plain = re.sub(r"`[^`\n]*`", "", prose(text))
    short = (re.sub(r"\s+", " ", formula) for formula in FORMULA.findall(plain))
    return Counter(WORDS.sub(lambda m: m[0] if re.fullmatch(r"in|out|rows?", m[1]) else r"\\text{}", f) for f in short)


def figures(text: str) -> list[str]:
    return re.findall(r"figures/(\w+\.png)\)", text)


def shape(text: str) -> list[str]:
    """Levels of headings, rows of tables, items of lists, answers: what stays when the words change."""
    marks = r"^(#+ |\| |- |\*\*\d+|<details>|</details>)"
    return re.findall(marks, prose(text), re.MULTILINE)


def paragraphs(text: str) -> set[str]:
    parts = (re.sub(r"\s+", " ", FORMULA.sub("", part)).strip() for part in prose(text).split("\n\n"))
    return {part for part in parts if len(part) > 60}


def differences(english: str, vietnamese: str) -> list[str]:
    """In which respects a translation is not of this page."""
    same = {"cells": cells, "formulas": formulas, "figures": figures, "structure": shape}
    found = [name for name, part in same.items() if part(english) != part(vietnamese)]
    found += ["quotes"] if COG.findall(english) != COG.findall(vietnamese) else []
    return found + ["not translated"] * bool(paragraphs(english) & paragraphs(vietnamese))


def both(name: str) -> tuple[str, str]:
    return tuple((TUTORIALS / folder / f"{name}.md").read_text(encoding="utf-8") for folder in ("", "vi"))


def test_these_pages_are_there_and_no_page_of_the_book_is_taken_for_them():
    assert sorted(page.stem for page in pages.all_pages(TUTORIALS / "vi")) == sorted(TRANSLATED)
    assert not [page for page in pages.all_pages() if page.parent.name == "vi"]


@pytest.mark.parametrize("name", TRANSLATED)
def test_only_the_prose_is_translated(name):
    assert differences(*both(name)) == []


@pytest.mark.parametrize("name", TRANSLATED)
def test_each_page_leads_to_its_twin(name):
    english, vietnamese = both(name)
    assert f"](vi/{name}.md)" in english
    assert f"[English](../{name}.md)" in vietnamese and "](thuat_ngu.md)" in vietnamese


def test_the_introduction_is_the_readme_in_other_words():
    english = (TUTORIALS.parent / "README.md").read_text(encoding="utf-8")
    vietnamese = (TUTORIALS / "vi" / "README.md").read_text(encoding="utf-8")
    assert "](tutorials/vi/README.md)" in english and "[English](../../README.md)" in vietnamese
    blocks = re.compile(r"^```(?:python|text)\n.*?^```$", re.DOTALL | re.MULTILINE)
    assert blocks.findall(vietnamese) == blocks.findall(english)
    commands = re.compile(r"^make \w+", re.MULTILINE)
    assert commands.findall(vietnamese) == commands.findall(english)
    assert shape(vietnamese) == shape(english)
    assert not paragraphs(english) & paragraphs(vietnamese)


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("lora_alpha=2", "lora_alpha=3", "cells"),
        (r"W' = W + s\, B A", r"W' = W + B A", "formulas"),
        ("01_shapes.png)", "01_parameters.png)", "figures"),
        ("## Các con số", "Các con số", "structure"),
        ('quote("lora_ref.core.update", "delta")', 'quote("lora_ref.core.update")', "quotes"),
    ],
)
def test_what_differs_is_found(old, new, found):
    english, vietnamese = both("01_one_layer")
    assert old in vietnamese
    assert found in differences(english, vietnamese.replace(old, new, 1))


def test_what_was_left_in_english_is_found():
    english, _ = both("01_one_layer")
    assert differences(english, english) == ["not translated"]
