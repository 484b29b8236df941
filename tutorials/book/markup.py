"""One page of the book, from Markdown to HTML: formulas, cells with what they printed, figures, quotes, links."""

import pathlib
import struct
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import nbformat
from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin

from book import formulas, listing, pages, places, quote, words

FENCE = "~" * 12  # around a cell, which may itself contain ```


@dataclass
class Page:
    """What has become of a page."""

    source: pathlib.Path
    title: str = ""
    body: str = ""
    sections: list[tuple[str, str]] = field(default_factory=list)  # anchor and heading of each ##
    targets: list[places.Target] = field(default_factory=list)  # of all its links to the repository
    mentions: list[places.Place] = field(default_factory=list)  # of those to code


def render(source: pathlib.Path, text: str | None = None) -> Page:
    """The page of a Markdown file (or of the given text, in its place). What cannot be shown raises a ValueError."""
    page, outputs = Page(source), {}
    if text is None:
        text, outputs = with_cells(source)
    # the pages fold their answers by HTML; elsewhere <n> is text
    options = {"html": source.is_relative_to(pages.HERE), "highlight": listing.highlighted}
    parser = MarkdownIt("commonmark", options).enable(["table"])
    parser.use(dollarmath_plugin, allow_space=False).use(anchors_plugin, max_level=4, permalink=True)
    tokens = parser.parse(pages.COG.sub("", text))
    for token in tokens:
        for child in [token, *(token.children or [])]:
            change(child, page)
    page.title = next((plain(tokens[i + 1]) for i, t in enumerate(tokens) if t.tag == "h1"), source.stem)
    page.sections = [
        (str(t.attrGet("id")), plain(tokens[i + 1]))
        for i, t in enumerate(tokens)
        if (t.type, t.tag) == ("heading_open", "h2")
    ]
    page.body = parser.renderer.render(with_blocks(tokens, page, outputs), parser.options, {})
    return page


def with_cells(source: pathlib.Path) -> tuple[str, dict[str, str]]:
    """The text of a page, its cells marked by their ids, and what each printed (of the executed notebook)."""
    executed = source.parent / "notebooks" / f"{source.stem}.ipynb"
    if not executed.is_file():  # a page in another language: the same cells
        executed = pages.HERE / "notebooks" / f"{source.stem}.ipynb"
    if source not in pages.all_pages(source.parent) or not executed.is_file():
        return source.read_text(encoding="utf-8"), {}
    outputs = {cell.id: shown(cell) for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code"}
    parts = []
    for cell in pages.read(source).cells:
        if cell.cell_type == "code" and cell.id not in outputs:
            raise ValueError(
                f"a cell is not in {executed.name}, so its output is not known: make tutorials\n{cell.source}"
            )
        is_code = cell.cell_type == "code"
        parts.append(f"{FENCE}cell {cell.id}\n{cell.source}\n{FENCE}" if is_code else cell.source)
    return "\n\n".join(parts), outputs


def shown(cell: nbformat.NotebookNode) -> str:
    """The outputs of a cell."""
    made = []
    for output in cell.outputs:
        data = output.get("data", {})
        if image := data.get("image/png"):
            made.append(f'<img class="output" alt="" src="data:image/png;base64,{escape("".join(image.split()))}">')
        elif text := output.get("text") or data.get("text/plain"):
            made.append(f'<pre class="output"><samp>{escape(text.rstrip())}</samp></pre>')
    return "\n".join(made)


def change(token: Token, page: Page) -> None:
    """Formulas become MathML; links lead to files of the site, and are noted."""
    if token.type.startswith("math_"):
        is_block = token.type != "math_inline"
        made = formulas.mathml(token.content.strip(), display=is_block)
        token.type, token.content = (
            ("html_block", f'<div class="math">{made}</div>\n') if is_block else ("html_inline", made)
        )
        return
    attribute = {"link_open": "href", "image": "src"}.get(token.type)
    if attribute is None:
        return
    target = places.resolve(page.source, str(token.attrGet(attribute)))
    if target is None:
        return
    page.targets.append(target)
    token.attrSet(attribute, places.href(page.source, target))
    if target.path.suffix == ".png":  # its size, so that the text does not move when the picture comes
        width, height = struct.unpack(">II", target.path.read_bytes()[16:24])
        token.attrs |= {"width": width, "height": height}
    if target.is_code:
        anchor = f"code-{len(page.mentions) + 1}"
        page.mentions.append(places.Place(page.source, anchor, target))
        token.attrs |= {"id": anchor, "class": "to-code"}


def with_blocks(tokens: Sequence[Token], page: Page, outputs: dict[str, str]) -> list[Token]:
    """The tokens, with blocks of HTML around or in place of quotes, cells, figures and tables."""
    made: list[Token] = []
    for token in tokens:
        info = token.info.split() if token.type == "fence" else []
        if info[:1] == ["cell"]:
            made.append(block(cell(token.content, outputs[info[1]], page)))
        elif info == ["py"] and (place := quoted(made[-3:], page)):
            made[-3:] = [block('<figure class="quote"><figcaption>'), made[-2], block("</figcaption>\n")]
            made.append(block(quotation(place, token.content.rstrip("\n")) + "</figure>\n"))
        elif token.type == "paragraph_close" and [child.type for child in made[-1].children or []] == ["image"]:
            made[-2:] = [block(figure(made[-1].children[0]))]
        elif token.type == "table_open":
            made += [block('<div class="table">\n'), token]
        elif token.type == "table_close":
            made += [token, block("</div>\n")]
        else:
            made.append(token)
    return made


def block(html: str) -> Token:
    return Token("html_block", "", 0, content=html)


def plain(inline: Token) -> str:
    """The text of a heading."""
    return "".join(child.content for child in inline.children or [] if child.type in ("text", "code_inline")).strip()


def figure(image: Token) -> str:
    """A picture whose text is read once: from `alt` by who cannot see it, below it by everybody else."""
    caption = escape(image.content)
    attributes = " ".join(
        f'{key}="{escape(str(value))}"' for key, value in (image.attrs | {"alt": image.content}).items()
    )
    return (
        f'<figure class="picture"><a href="{escape(str(image.attrs["src"]))}"><img {attributes} loading="lazy"></a>'
        f'<figcaption aria-hidden="true">{caption}</figcaption></figure>\n'
    )


def cell(source: str, output: str, page: Page) -> str:
    """A cell and what it printed. That of a figure is folded: one looks at the figure."""
    code = f'<pre class="highlight"><code>{listing.highlighted(source, "python")}</code></pre>\n{output}'
    if not pages.SAVED.search(source):
        return f'<div class="cell">{code}</div>\n'
    told = words.of(places.language(page.source))["figure"]
    return f'<details class="cell"><summary>{told}</summary>{code}</details>\n'


def quoted(before: list[Token], page: Page) -> places.Place | None:
    """The lines that a paragraph names, if it is a link to lines of a module and nothing else."""
    if [token.type for token in before] != ["paragraph_open", "inline", "paragraph_close"]:
        return None
    children = before[1].children or []
    if children[0].type != "link_open" or [child.type for child in children].index("link_close") != len(children) - 1:
        return None
    place = next((p for p in page.mentions if p.anchor == children[0].attrGet("id")), None)
    return place if place and place.target.lines else None


def quotation(place: places.Place, code: str) -> str:
    """Code of a module, each line linked to its place there. Code that is not there raises a ValueError."""
    path, (first, last) = place.target.path, place.target.lines
    lines = quote.code_lines(path.read_text(encoding="utf-8"), first, last)
    if textwrap.dedent("\n".join(lines.values())) != code:
        raise ValueError(f"the quote is not what {path.name} has in lines {first} to {last}: make tutorials")
    links = [places.href(place.page, places.Target(path, f"L{number}")) for number in lines]
    rows = zip(lines, links, listing.colours(code), strict=True)
    made = (f'<a class="number" href="{link}" tabindex="-1">{number}</a>{line}' for number, link, line in rows)
    return '<pre class="highlight"><code>' + "\n".join(made) + "</code></pre>\n"
