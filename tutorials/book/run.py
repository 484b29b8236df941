"""Execute the pages from scratch: `python tutorials/book/run.py [PAGE ...] [--write | --check]`.

Each page runs in a kernel of its own, in a copy of tutorials/: two at once, or one where OMP_NUM_THREADS is not 1.
--check (the default) compares what comes out with what is committed, --write commits it to the folder:
figures (tutorials/figures/*.png, *.json) and notebooks (tutorials/notebooks/*.ipynb).
"""

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

if __name__ == "__main__":  # the folder of a script is no place to import from; the folder above it is
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from book import compare, pages

TOLERANCE = 0.02
START = f"import sys; sys.path.append({str(pages.HERE)!r}); import book.record; book.record.start()"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "PYTHONHASHSEED": "0"}
ENVIRONMENT["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
ENVIRONMENT |= {"COLUMNS": "100", "PYDEVD_DISABLE_FILE_VALIDATION": "1", "TQDM_DISABLE": "1"}


@dataclass
class Result:
    """What a page has come to."""

    page: pathlib.Path
    notebook: nbformat.NotebookNode
    figures: dict[str, bytes] = field(default_factory=dict)  # by path in tutorials/: .png and .json
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def execute(page: pathlib.Path, tick=lambda: None) -> Result:
    """Run a page in a copy of its folder. A cell that fails is the result's problem, and ends the page."""
    began = time.monotonic()
    nb = pages.read(page)
    shown = [name for figure in pages.figures_shown(page.read_text(encoding="utf-8")) for name in both(figure)]
    result = Result(page, nb)
    with tempfile.TemporaryDirectory(prefix="book-") as scratch:
        folder = pathlib.Path(scratch) / "tutorials"
        ignored = shutil.ignore_patterns("notebooks", "site", "vi", "__pycache__", ".ipynb_checkpoints")
        shutil.copytree(page.parent, folder, ignore=ignored)
        for name in ("lora_ref", "spec_tests", "README.md"):
            os.symlink(pages.HERE.parent / name, pathlib.Path(scratch) / name)
        for old in (folder / "figures").glob(f"{page.stem.split('_')[0]}_*"):
            old.unlink()
        before = set(folder.glob("figures/*"))
        result.problems += run_cells(nb, folder, page.stem, tick)
        made = sorted(set(folder.glob("figures/*")) - before)
        result.figures = {f"figures/{path.name}": path.read_bytes() for path in made}
    printed = "\n".join(text_of(cell) for cell in nb.cells if cell.cell_type == "code")
    if str(pages.HERE.parent) in printed or f"{tempfile.gettempdir()}/" in printed:
        result.problems.append("a cell prints a path of this machine")
    if not result.problems:
        result.problems += [f"{name} is shown, but not made" for name in shown if name not in result.figures]
        result.problems += [f"{name} is made, but not shown" for name in result.figures if name not in shown]
    for figure, caption in pages.figures_shown(page.read_text(encoding="utf-8")).items():
        if len(caption) < 20:
            result.problems.append(f"{figure} needs a caption that states its message")
    result.seconds = time.monotonic() - began
    return result


def both(figure: str) -> tuple[str, str]:
    return figure, str(pathlib.PurePosixPath(figure).with_suffix(".json"))


def run_cells(nb: nbformat.NotebookNode, folder: pathlib.Path, name: str, tick) -> list[str]:
    """Execute the cells in place, outputs and all; what went wrong."""
    client = NotebookClient(nb, timeout=600, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.create_kernel_manager()
    client.km.transport, client.km.ip = "ipc", str(folder.parent / "kernel")  # files, to which nobody else listens
    count = 0
    nb.cells.insert(0, nbformat.v4.new_code_cell(START))  # nbclient runs nothing but cells
    try:
        with client.setup_kernel(env={**os.environ, **ENVIRONMENT}):
            for index, cell in enumerate(nb.cells):
                if cell.cell_type != "code":
                    continue
                client.execute_cell(cell, index)
                cell.execution_count = count
                cell.outputs = tidied(cell.outputs, count)
                count += 1
                tick()
    except CellExecutionError as error:
        return [f"a cell fails:\n{indented(cell.source)}\n    {error.ename}: {error.evalue}"]
    finally:
        del nb.cells[0]
    return []


def indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())


def tidied(outputs: list, count: int) -> list:
    """Streams of one kind in one piece, plain text instead of its HTML twin, no warnings, no timings."""
    kept: list = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        else:
            output.data = {k: v for k, v in output.data.items() if k in ("text/plain", "image/png")}
            if not output.data.get("image/png") and not output.data.get("text/plain"):
                continue  # what a progress bar leaves behind
            output.metadata = {}
            if "execution_count" in output:
                output.execution_count = count
        kept.append(output)
    return kept


def check(result: Result) -> list[str]:
    """How a page's outputs differ from what is committed."""
    home, name, problems = result.page.parent, result.page.stem, []
    for path, content in result.figures.items():
        committed = home / path
        if not committed.is_file():
            problems.append(f"{path} is not committed: make tutorials")
        elif path.endswith(".json"):
            said = compare.figures(committed.read_text("utf-8"), content.decode(), tolerance_for(result, path))
            problems += [f"{path}: {said}"] if said else []
    for committed in sorted((home / "figures").glob(f"{name.split('_')[0]}_*")):
        if f"figures/{committed.name}" not in result.figures:
            problems.append(f"figures/{committed.name} is committed, and the page does not make it")
    path = home / "notebooks" / f"{name}.ipynb"
    if not path.is_file():
        return [*problems, f"notebooks/{name}.ipynb is not committed: make tutorials"]
    return problems + check_notebook(nbformat.read(path, 4), pages.as_notebook(result.notebook, name))


def tolerance_for(result: Result, path: str) -> float:
    """Of the cell that saves the figure."""
    png = str(pathlib.PurePosixPath(path).with_suffix(".png"))
    cells = [cell.source for cell in result.notebook.cells if cell.cell_type == "code"]
    saving = [source for source in cells if png in pages.SAVED.findall(source)]
    return pages.tolerance_of("\n".join(saving), TOLERANCE)


def check_notebook(old: nbformat.NotebookNode, new: nbformat.NotebookNode) -> list[str]:
    """The same cells, and the same outputs but for the last digits."""
    if [(c.cell_type, c.source) for c in old.cells] != [(c.cell_type, c.source) for c in new.cells]:
        return ["the notebook has other cells than the page: make tutorials"]
    problems = []
    for before, after in zip(old.cells, new.cells, strict=True):
        said = compare.texts(text_of(before), text_of(after), pages.tolerance_of(after.source, TOLERANCE))
        if said:
            problems.append(f"the output of a cell has changed: {said}\n{indented(after.source)}")
    return problems


def text_of(cell: nbformat.NotebookNode) -> str:
    """All that a cell prints and returns."""
    pieces = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])]
    return "\n".join(pieces)


def write(result: Result) -> list[str]:
    """Put figures and notebook in their places; figures that the page no longer makes go. Which files changed?"""
    home, changed = result.page.parent, []
    notebook = nbformat.writes(pages.as_notebook(result.notebook, result.page.stem)).strip() + "\n"
    wanted = {**result.figures, f"notebooks/{result.page.stem}.ipynb": notebook.encode()}
    for path, content in wanted.items():
        target = home / path
        target.parent.mkdir(exist_ok=True)
        if not target.is_file() or target.read_bytes() != content:
            target.write_bytes(content)
            changed.append(path)
    for old in sorted((home / "figures").glob(f"{result.page.stem.split('_')[0]}_*")):
        if f"figures/{old.name}" not in wanted:
            old.unlink()
            changed.append(f"figures/{old.name} (removed)")
    return changed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Execute the tutorials from scratch.")
    parser.add_argument("page", nargs="*", help="a number (3), a name (03_zero_factor) or a path; default: all")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with what is committed (the default)")
    mode.add_argument("--write", action="store_true", help="write figures and notebooks")
    options = parser.parse_args(arguments)
    chosen, console, failed = pages.find_pages(options.page), Console(), 0
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    began = time.monotonic()
    # two pages at once; with more threads one, since threads that wait for a core spin
    at_once = 2 if ENVIRONMENT["OMP_NUM_THREADS"] == "1" else 1
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(at_once) as pool:

        def one(page: pathlib.Path) -> Result:
            cells = 1 + sum(cell.cell_type == "code" for cell in pages.read(page).cells)
            task = progress.add_task(page.stem, total=cells)
            result = execute(page, lambda: progress.advance(task))
            progress.remove_task(task)
            return result

        for result in pool.map(one, chosen):
            changed = []
            if not result.problems and not options.write:
                result.problems += check(result)
            elif not result.problems:
                changed = write(result)
            failed += bool(result.problems)
            verdict = "[red]FAILED[/]" if result.problems else "[green]ok[/]"
            told = f" wrote {', '.join(changed)}" if changed else ""
            console.print(f"{result.page.stem:<24} {verdict} {result.seconds:6.1f} s{told}", highlight=False)
            for problem in result.problems:
                console.print("  " + problem.replace("\n", "\n  "), markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(chosen) - failed} of {len(chosen)} pages are well, {time.monotonic() - began:.0f} s in all")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
