"""The pages: where they are, what they show, and the notebook that is made of each."""

import hashlib
import pathlib
import re

import jupytext
import nbformat

HERE = pathlib.Path(__file__).resolve().parents[1]  # tutorials/
FIGURE = re.compile(r"!\[(?P<caption>[^\]]*)\]\((?P<path>figures/[^)\s]+)\)")
SAVED = re.compile(r"""savefig\(\s*["'](figures/[^"']+)["']""")
TOLERANCE = re.compile(r"^\s*#.*\btolerance:?\s+([0-9.e-]+)", re.MULTILINE)
COG = re.compile(r"<!-- \[\[\[.*?-->\n?|<!-- fmt: o(?:n|ff) -->\n?", re.DOTALL)
NOTE = """*Made from [`tutorials/{name}.md`](../{name}.md) by `make tutorials`: change that file, not this one.
It runs where `lora_ref[tutorials]` is installed. In Colab, first upload or clone the repository, then
`%pip install -e ".[tutorials]"` and `%cd tutorials` in a cell above this one.*"""
SETUP = """import os

if not os.path.exists("figures/book.mplstyle"):
    os.chdir("..")  # from notebooks/ to tutorials/, where the pages are at home"""


#: These train models, or try a suite: minutes rather than seconds.
LONG = ("02_scaling", "10_fine_tune", "11_claims", "12_test_your_lora", "15_trainer", "16_past_one_device")


def all_pages(folder: pathlib.Path = HERE) -> list[pathlib.Path]:
    """The pages there are, in order."""
    return sorted(folder.glob("[0-9][0-9]_*.md"))


def find_pages(names: list[str], folder: pathlib.Path = HERE) -> list[pathlib.Path]:
    """Pages by number, by name or by path; all of them for none."""
    pages = all_pages(folder)
    wanted = [pathlib.Path(name).name.removesuffix(".md") for name in names]
    unknown = [w for w in wanted if not any(matches(page, w) for page in pages)]
    if unknown:
        raise SystemExit(f"no such page: {', '.join(unknown)}. There are: {', '.join(page.stem for page in pages)}")
    return [page for page in pages if not wanted or any(matches(page, w) for w in wanted)]


def matches(page: pathlib.Path, wanted: str) -> bool:
    return page.stem == wanted or page.stem.split("_")[0] == wanted.zfill(2)


def figures_shown(text: str) -> dict[str, str]:
    """Path and caption of every figure of a page's text."""
    return {match["path"]: match["caption"] for match in FIGURE.finditer(text)}


def tolerance_of(source: str, default: float) -> float:
    """A cell may say `# tolerance 0.1`, for the numbers that it prints and the figures that it saves."""
    found = TOLERANCE.findall(source)
    return max(map(float, found)) if found else default


def read(page: pathlib.Path) -> nbformat.NotebookNode:
    """A page as a notebook without outputs; the cells' ids follow from what is in them."""
    nb = jupytext.reads(page.read_text(encoding="utf-8"), fmt="md")
    nb.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    seen: dict[str, int] = {}
    for cell in nb.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = f"{digest}-{seen[digest]}"
        cell.metadata = {}
    return nb


def as_notebook(nb: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
    """An executed page as it is committed: links as seen from notebooks/, answers folded, a note on top."""
    cells, folded = [], False
    for cell in nb.cells:
        cell = nbformat.from_dict(cell)
        if cell.cell_type == "markdown":
            folded = cell.source.rfind("<details>") > cell.source.rfind("</details>") or (
                folded and "</details>" not in cell.source
            )
            cell.source = relinked(COG.sub("", cell.source)).strip()
            if not cell.source:
                continue
        elif folded:
            cell.metadata["jupyter"] = {"source_hidden": True, "outputs_hidden": True}
        cells.append(cell)
    note = nbformat.v4.new_markdown_cell(NOTE.format(name=name), id="note")
    setup = nbformat.v4.new_code_cell(SETUP, id="setup")
    made = nbformat.v4.new_notebook(cells=[note, setup, *cells], metadata=dict(nb.metadata))
    made.nbformat_minor = 5
    nbformat.validate(made)
    return made


def relinked(markdown: str) -> str:
    """Relative links of a page, as seen from notebooks/; those to other pages lead to their notebooks."""

    def moved(match: re.Match) -> str:
        target = match[1]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if page := re.match(r"(\d\d_\w+)\.md(#.*)?$", target):
            return f"]({page[1]}.ipynb{page[2] or ''})"
        return f"](../{target})"

    return re.sub(r"\]\(([^)\s]+)\)", moved, markdown)
