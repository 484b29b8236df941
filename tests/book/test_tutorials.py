"""The pages of the book say what the code does: quotes, links, outputs and figures are those of today."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest
from imports import IN_ROOMS, MODULES, ROOMS, graph, room_of

ROOT = pathlib.Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "tutorials"
if importlib.util.find_spec("jupytext") is None or importlib.util.find_spec("nbclient") is None:
    pytest.skip("needs pip install 'lora_ref[tutorials]'", allow_module_level=True)

sys.path.insert(0, str(TUTORIALS))
from book import compare, pages, quote, run  # noqa: E402

PAGES = pages.all_pages()
PROSE = sorted(TUTORIALS.glob("*.md")) + sorted(TUTORIALS.glob("vi/*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def named(path: pathlib.Path) -> str:
    return path.relative_to(TUTORIALS).as_posix()


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower())
    return text.strip().replace(" ", "-")


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.deep] * (page.stem in pages.LONG), id=page.stem) for page in PAGES]
)
def test_a_page_executed_from_scratch_prints_and_plots_what_is_committed(page):
    result = run.execute(page)
    assert not result.problems, "\n".join(result.problems)
    assert not run.check(result), "\n".join(run.check(result))


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_code_in_the_prose_is_the_code_of_the_module(page):
    command = [sys.executable, "-m", "cogapp", "--check", "-P", "-I", str(TUTORIALS), str(page)]
    wide = {**os.environ, "COLUMNS": "120"}  # as `make tutorials` has it: for tables that rich draws
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=wide)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nmake tutorials renews the quotes"


@pytest.mark.parametrize("page", PROSE, ids=named)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = (page.parent / path).resolve() if path else page
        if not there.exists():
            broken.append(target)
        elif lines := re.fullmatch(r"L(\d+)(?:-L(\d+))?", anchor):
            last = int(lines[2] or lines[1])
            broken += [target] if last > len(there.read_text("utf-8").splitlines()) else []
        elif anchor:
            headings = re.findall(r"^#+ (.*)$", FENCE.sub("", there.read_text("utf-8")), re.MULTILINE)
            broken += [] if anchor in map(slug, headings) else [target]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_what_every_page_has(page):
    text = page.read_text(encoding="utf-8")
    number = int(page.stem.split("_")[0])
    assert re.search(rf"^# {number}\. ", text, re.MULTILINE)
    assert "## What you will learn" in text
    exercises = text.split("## Exercises")[1]
    answers = re.findall(r"<details><summary>Answer</summary>\n\n(.*?)\n\n</details>", exercises, re.DOTALL)
    assert 2 <= len(answers) <= 4
    assert any("```python" in answer for answer in answers)  # answers are executed, too
    assert pages.figures_shown(text), "one looks rather than reads: a page has a picture"
    assert re.search(r"^(Previous|Contents): ", text.strip().splitlines()[-1])


def test_the_contents_list_every_page():
    contents = (TUTORIALS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\((\d\d_\w+)\.md\)", contents)
    assert listed == [page.stem for page in PAGES]


def listed_modules() -> list[str]:
    """The modules in the tables of reading_order.md."""
    text = (TUTORIALS / "reading_order.md").read_text(encoding="utf-8")
    calls = re.findall(r"\[\[\[cog modules\((.*?)\)", text, re.DOTALL)
    return [f"lora_ref.{name}" for call in calls for name in re.findall(r'"([\w.]+)"', call)]


def test_the_reading_order_has_every_module_once():
    has_code = {name for name in IN_ROOMS if len(MODULES[name].read_text(encoding="utf-8").splitlines()) > 1}
    assert sorted(listed_modules()) == sorted(has_code)


def test_no_module_of_the_reading_order_imports_a_later_one():
    listed = listed_modules()
    for number, name in enumerate(listed):
        assert not graph()[name] & set(listed[number + 1 :]), name


def test_the_reading_order_names_the_rooms_in_their_order():
    text = (TUTORIALS / "reading_order.md").read_text(encoding="utf-8")
    assert f"The rooms have one order: {', '.join(f'`{room}`' for room in ROOMS)}." in text
    headings = re.findall(r"^## (?:The )?(\w+)$", text, re.MULTILINE)
    assert headings == list(ROOMS) == list(dict.fromkeys(map(room_of, listed_modules())))


def test_a_page_whose_statement_is_wrong_fails(tmp_path):
    page = copied(tmp_path, "assert s == 2", "assert s == 3")
    result = run.execute(page)
    assert (
        len(result.problems) == 1 and "AssertionError" in result.problems[0] and "assert s == 3" in result.problems[0]
    )


def copied(folder: pathlib.Path, old: str, new: str) -> pathlib.Path:
    """A page of two cells in a folder of its own, with a change."""
    (folder / "figures").mkdir()
    cells = ["s = 2 / 1\nassert s == 2\nprint('s is', s)", "print(s + 1)"]
    text = "# 1. Try\n" + "\nMore.\n".join(f"\n```python\n{cell}\n```\n" for cell in cells)
    page = folder / "01_try.md"
    page.write_text(text.replace(old, new), encoding="utf-8")
    return page


def test_a_page_whose_output_has_changed_is_found(tmp_path):
    page = copied(tmp_path, "", "")
    run.write(run.execute(page))
    assert run.check(run.execute(page)) == []
    page.write_text(page.read_text().replace("s = 2 / 1", "s = 2.0"))
    assert "other cells" in run.check(run.execute(page))[0]
    committed = tmp_path / "notebooks" / "01_try.ipynb"
    page.write_text(page.read_text().replace("s = 2.0", "s = 2 / 1"))
    committed.write_text(committed.read_text().replace("s is 2.0", "s is 2.5"))
    assert "the output of a cell has changed" in run.check(run.execute(page))[0]


@pytest.mark.parametrize(
    "old, new, same",
    [
        ("x = 0.123456", "x = 0.123457", True),  # one in the last place
        ("x = 0.1234", "x = 0.1334", False),
        ("x = 12", "x = 13", False),  # whole numbers exactly
        ("x = 12", "y = 12", False),
        ("1e-16", "-3e-17", True),  # both are rounding errors
        ("a 1.00 b", "a 10.0 b", False),
        ("one\ntwo", "one", False),
    ],
)
def test_outputs_are_compared_as_a_reader_would(old, new, same):
    assert (compare.texts(old, new, 0.02) is None) == same


def test_a_quote_is_the_code_without_its_docstring():
    first, last, code = quote.excerpt(
        'class A:\n    """Text."""\n\n    @property\n    def f(self):\n        "x"\n        return 1\n', "A.f"
    )
    assert (first, last, code) == (4, 7, "@property\ndef f(self):\n    return 1")
    with pytest.raises(LookupError, match=r"nothing is called A\.g"):
        quote.excerpt("class A:\n    pass\n", "A.g")
    with pytest.raises(FileNotFoundError, match=r"no module lora_ref\.nothing"):
        quote.path_of("lora_ref.nothing")
