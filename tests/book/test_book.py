"""The HTML edition of the tutorials: every link leads somewhere, and text and code lead to each other."""

import importlib.util
import itertools
import os
import pathlib
import re
import sys
import textwrap
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "tutorials"
if any(importlib.util.find_spec(name) is None for name in ("jupytext", "latex2mathml", "mdit_py_plugins", "pygments")):
    pytest.skip("needs pip install 'lora_ref[tutorials]'", allow_module_level=True)

sys.path.insert(0, str(TUTORIALS))
from book import edition, formulas, listing, markup, pages, places, skin  # noqa: E402

VOID = {"br", "hr", "img", "link", "meta"}
QUOTE = re.compile(r"\bquote\(\s*\"")


class Reader(HTMLParser):
    """A page as a tree. A tag that is closed out of order raises an AssertionError."""

    def __init__(self, html: str):
        super().__init__()
        self.builder, self.open = ElementTree.TreeBuilder(), []
        self.feed(html)
        assert not self.open, self.open
        self.tree = self.builder.close()

    def handle_starttag(self, tag, attrs):
        self.builder.start(tag, {key: value or "" for key, value in attrs})
        self.open.append(tag)
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages of the site by path, and the folder."""
    out = tmp_path_factory.mktemp("book") / "site"
    written = edition.build(out)
    assert {path for path in out.rglob("*") if path.is_file()} == set(written)
    trees = {path: Reader(path.read_text(encoding="utf-8")).tree for path in written if path.suffix == ".html"}
    return out, trees


def classed(tree: ElementTree.Element, tag: str, name: str) -> list[ElementTree.Element]:
    return [element for element in tree.iter(tag) if name in element.get("class", "").split()]


def text(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def outside_code(element: ElementTree.Element) -> str:
    if element.tag in ("pre", "code", "samp"):
        return ""
    return (element.text or "") + "".join(outside_code(child) + (child.tail or "") for child in element)


def followed(page: pathlib.Path, href: str) -> tuple[pathlib.Path, str]:
    """File and anchor that a link of a page leads to."""
    path, _, anchor = href.partition("#")
    return pathlib.Path(os.path.normpath(page.parent / path)) if path else page, unquote(anchor)


def prose(out: pathlib.Path) -> dict[pathlib.Path, pathlib.Path]:
    """The source of each page of the book, by its file in the site."""
    sources = [page for folder in (TUTORIALS, *skin.languages()) for page in skin.order(folder)]
    return {out / places.in_site(source): source for source in sources}


def test_every_page_of_the_book_and_every_module_has_a_page(site):
    out, trees = site
    assert prose(out).keys() <= trees.keys()
    modules = [path for path in (ROOT / "lora_ref").rglob("*.py") if "__pycache__" not in path.parts]
    assert {out / places.in_site(path) for path in modules} <= trees.keys()


def test_no_link_is_dead(site):
    out, trees = site
    ids = {path: [element.get("id") for element in tree.iter() if element.get("id")] for path, tree in trees.items()}
    dead = [f"{path}: id {name} twice" for path, names in ids.items() for name in set(names) if names.count(name) > 1]
    for path, tree in trees.items():
        links = [element.get(key) for element in tree.iter() for key in ("href", "src") if element.get(key)]
        for link in links:
            if re.match(r"[a-z]+:", link):
                continue
            there, anchor = followed(path, link)
            if not there.is_file() or (anchor and anchor not in ids[there]):
                dead.append(f"{path.relative_to(out)}: {link}")
    assert not dead


def test_nothing_is_loaded_from_elsewhere(site):
    out, trees = site
    for path, tree in trees.items():
        for element in tree.iter():
            for key in ("src", "href", "srcset", "data", "poster", "action", "style"):
                if element.tag != "a" and element.get(key):
                    assert not re.search(r"//|url\(", element.get(key)), (path, element.tag, element.get(key)[:99])
    assert not re.search(
        r"@import|url\(|//", re.sub(r"/\*.*?\*/", "", (out / "theme.css").read_text(), flags=re.DOTALL)
    )
    assert not re.search(r"\bimport\b|fetch|XMLHttp|https?:", (out / "sync.js").read_text())


def test_a_quote_leads_to_the_lines_that_hold_it_and_these_lines_lead_back(site):
    out, trees = site
    for path, source in prose(out).items():
        quotes = classed(trees[path], "figure", "quote")
        assert len(quotes) == len(QUOTE.findall(source.read_text(encoding="utf-8"))), source
        for figure in quotes:
            caption = figure.find("figcaption").find("a")
            there, anchor = followed(path, caption.get("href"))
            first, last = map(int, re.fullmatch(r"L(\d+)-L(\d+)", anchor).groups())
            module = {line.get("id"): text(line.find("code")) for line in classed(trees[there], "span", "line")}
            numbers = classed(figure, "a", "number")
            assert {followed(path, number.get("href"))[0] for number in numbers} == {there}
            held = [module[followed(path, number.get("href"))[1]] for number in numbers]
            shown = re.sub(r"^\d+", "", text(figure.find("pre")), flags=re.MULTILINE)
            assert textwrap.dedent("\n".join(held)) == shown.rstrip("\n")
            assert [followed(path, number.get("href"))[1] for number in numbers] == [f"L{text(n)}" for n in numbers]
            assert first == int(text(numbers[0])) and int(text(numbers[-1])) <= last
            back = [
                mark
                for mark in classed(trees[there], "a", "mark")
                if followed(there, mark.get("href")) == (path, caption.get("id"))
            ]
            assert len(back) == 1, (path, anchor)
            assert re.fullmatch(rf"grid-area:{first}/\d+/{last + 1}", back[0].get("style"))
            listed = [
                followed(there, link.get("href")) for link in classed(trees[there], "ul", "mentions")[0].iter("a")
            ]
            assert (path, caption.get("id")) in listed


def test_a_module_is_shown_line_by_line_as_it_is(site):
    out, trees = site
    for module in sorted((ROOT / "lora_ref").rglob("*.py")):
        lines = classed(trees[out / places.in_site(module)], "span", "line")
        source = module.read_text(encoding="utf-8").rstrip("\n").split("\n")
        assert [text(line.find("code")) for line in lines] == source
        assert [line.get("id") for line in lines] == [f"L{n}" for n in range(1, len(source) + 1)]
        starts = [int(re.match(r"grid-area:(\d+)/", line.get("style"))[1]) for line in lines]
        assert starts == list(range(1, len(source) + 1))


def test_every_formula_is_mathml(site):
    out, trees = site
    for path, source in prose(out).items():
        bare = re.sub(
            r"^(```|~~~).*?^\1", "", pages.COG.sub("", source.read_text("utf-8")), flags=re.DOTALL | re.MULTILINE
        )
        written = re.findall(r"\$\$.+?\$\$|\$[^$]+\$", re.sub(r"`[^`\n]+`", "", bare), flags=re.DOTALL)
        shown = [text(element) for element in trees[path].iter("math")]
        assert len(shown) == len(written), source
        assert not [formula for formula in shown if "\\" in formula or "$" in formula]
        assert "$" not in outside_code(trees[path].find("body")), source


def test_the_outputs_of_the_cells_are_shown_in_order(site):
    out, trees = site
    for path, source in prose(out).items():
        executed = TUTORIALS / "notebooks" / f"{source.stem}.ipynb"
        if not re.match(r"\d\d_", source.stem):
            continue
        cells = [cell for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code"]
        printed = [o.get("text") or o.get("data", {}).get("text/plain", "") for cell in cells for o in cell.outputs]
        assert [text(samp) for samp in trees[path].iter("samp")] == [said.rstrip() for said in printed if said]


def test_a_page_says_its_language_title_and_neighbours(site):
    out, trees = site
    for path, tree in trees.items():
        folder = path.relative_to(out).parts[0]
        assert tree.get("lang") == (folder if re.fullmatch("[a-z]{2}", folder) else "en")
        assert text(tree.find("head").find("title")).strip()
        assert all("alt" in image.attrib for image in tree.iter("img"))
    chapters = [path for path, source in prose(out).items() if source.parent == TUTORIALS]
    for before, after in itertools.pairwise(chapters):
        relations = {link.get("rel"): link.get("href") for link in trees[before].iter("link")}
        assert followed(before, relations["next"])[0] == after
    translated = markup.Page(TUTORIALS / "vi" / "01_one_layer.md", "1. Một lớp")
    assert '<html lang="vi">' in skin.TEMPLATE.template.replace("$lang", places.language(translated.source))


@pytest.mark.parametrize(
    "latex, said",
    [
        (r"\foo{x}", r"does not know \\foo"),
        (r"\frac{a}", "a mfrac has 1 parts and needs 2"),
        (r"a_{", "no formula"),
        (r"\begin{pmatrix} 1", "no formula"),
    ],
)
def test_a_formula_that_cannot_be_drawn_is_named(latex, said):
    with pytest.raises(ValueError, match=said) as caught:
        markup.render(TUTORIALS / "01_one_layer.md", f"A formula, ${latex}$.\n")
    assert latex in str(caught.value)


def test_brackets_have_the_space_of_brackets():
    made = formulas.mathml(r"\Bigl\lVert x \Bigr\rVert_F \lvert y \rvert", display=False)
    assert [form for form in re.findall(r'form="(\w+)"', made)] == ["prefix", "postfix"] * 2


@pytest.mark.parametrize(
    "written, said",
    [
        ("[page 99](99_none.md)", "the link 99_none.md leads to no file"),
        ("[out](../..)", "leads to no file"),
        ("[`x`](../lora_ref/core/scaling.py#L1-L2)\n\n```py\ns = 1\n```", "not what scaling.py has in lines 1 to 2"),
    ],
)
def test_a_page_that_does_not_fit_the_repository_is_refused(written, said):
    with pytest.raises(ValueError, match=said):
        markup.render(TUTORIALS / "01_one_layer.md", written)


def test_a_cell_that_was_not_executed_is_refused(monkeypatch):
    changed = pages.read(TUTORIALS / "01_one_layer.md")
    changed.cells[1].id = "another"
    monkeypatch.setattr(pages, "read", lambda page: changed)
    with pytest.raises(ValueError, match=r"a cell is not in 01_one_layer\.ipynb.*make tutorials"):
        markup.render(TUTORIALS / "01_one_layer.md")


def test_what_is_wrong_is_said_with_its_page_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(formulas, "FENCES", {"W": "\\\\foo"})
    assert edition.main(["--out", str(tmp_path / "site")]) == 1
    said = capsys.readouterr().err
    assert re.search(r"^tutorials/01_one_layer\.md: .*\\foo", said, re.MULTILINE)
    assert re.search(r"^tutorials/14_errata\.md: .*\\foo", said, re.MULTILINE)
    assert not (tmp_path / "site").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert edition.main(["--out", str(tmp_path)]) == 1
    assert "is not a site of the book" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_marks_of_lines_that_overlap_are_beside_each_other():
    page, path = TUTORIALS / "01_one_layer.md", ROOT / "lora_ref" / "layer.py"
    known = [
        places.Place(page, f"code-{n}", places.Target(path, anchor))
        for n, anchor in enumerate(["L1-L9", "L2-L3", "L9-L12", "L4"])
    ]
    columns = {place.target.anchor: column for place, column in listing.beside(known).items()}
    assert columns == {"L1-L9": 1, "L2-L3": 2, "L4": 2, "L9-L12": 2}
