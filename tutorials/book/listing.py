"""Code as HTML: highlighted by pygments, and a module's page with its lines numbered and linked back to the book.

A module is a grid with a row for each line. A place of the book that names some of the lines is a band behind these
rows (`id="L33-L48"`, which a link to the lines lights up), and a mark beside them, which leads to the place.
"""

import pathlib
from collections.abc import Callable
from html import escape

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from book import places

LIGHT, DARK = "default", "github-dark"


def highlighted(code: str, language: str, _attributes: str = "") -> str:
    """Code with its tokens as spans, none of which goes on over the end of a line."""
    try:
        lexer = get_lexer_by_name(language or "text", stripnl=False, ensurenl=False)
    except ClassNotFound:
        return escape(code)
    return highlight(code, lexer, HtmlFormatter(nowrap=True)).removesuffix("\n")


def colours(source: str) -> list[str]:
    """The lines of a module, highlighted."""
    return highlighted(source, "python").split("\n")


def styles() -> str:
    """CSS of the tokens, for light and for dark screens."""
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in (LIGHT, DARK))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def module(path: pathlib.Path, known: list[places.Place], title: Callable[[pathlib.Path], str]) -> str:
    """The page of a module; `known` are the places that link to it, `title` says what a page is called."""
    source = path.read_text(encoding="utf-8").rstrip("\n")
    columns = beside([place for place in known if place.target.lines])
    width = max(columns.values(), default=1)
    rows = [
        f'<span class="line" id="L{n}" style="grid-area:{n}/{width + 1};--indent:{len(line) - len(line.lstrip())}">'
        f'<a class="number" href="#L{n}" tabindex="-1">{n}</a><code>{html}</code></span>'
        for n, (line, html) in enumerate(zip(source.split("\n"), colours(source), strict=True), start=1)
    ]
    bands = [
        f'<span class="band" id="L{first}-L{last}" style="grid-row:{first}/{last + 1}"></span>'
        for first, last in sorted({place.target.lines for place in columns})
    ]
    marks = [mark(path, place, column, f"{title(place.page)}, {told(place)}") for place, column in columns.items()]
    name, own = escape(path.relative_to(places.ROOT).as_posix()), places.in_site(path).name
    return (
        f'<h1><a href="{own}" target="_top"><code>{name}</code></a></h1>\n{mentions(path, known, title)}'
        f'<div class="module highlight" style="--columns:{width}">\n'
        + "\n".join([*bands, *marks, *rows])
        + "\n</div>\n"
    )


def beside(known: list[places.Place]) -> dict[places.Place, int]:
    """The column of each mark: the first one that is free along its lines."""
    columns: dict[places.Place, int] = {}
    for place in sorted(known, key=lambda place: place.target.lines):
        taken = {column for other, column in columns.items() if other.target.lines[1] >= place.target.lines[0]}
        columns[place] = next(n for n in range(1, len(columns) + 2) if n not in taken)
    return columns


def mark(path: pathlib.Path, place: places.Place, column: int, text: str) -> str:
    """A link back to a place of the book, as long as the lines that it names."""
    first, last = place.target.lines
    return (
        f'<a class="mark" style="grid-area:{first}/{column}/{last + 1}" href="{back(path, place)}" target="_top" '
        f'title="{escape(text)}" aria-label="{escape(text)}">{short(place.page)}</a>'
    )


def short(page: pathlib.Path) -> str:
    """What a mark says: the number of a page, or its language."""
    number, language = page.stem.split("_")[0], places.language(page)
    return language if language != "en" else str(int(number)) if number.isdigit() else "·"


def mentions(path: pathlib.Path, known: list[places.Place], title: Callable[[pathlib.Path], str]) -> str:
    """Where the book speaks of a module, page by page."""
    items = ""
    for page in dict.fromkeys(place.page for place in known):
        here = [place for place in known if place.page == page]
        links = [f'<a href="{back(path, place)}" target="_top">{told(place)}</a>' for place in here]
        items += f"<li>{escape(title(page))}: {', '.join(links)}</li>\n"
    return f'<ul class="mentions">\n{items}</ul>\n' if items else ""


def back(path: pathlib.Path, place: places.Place) -> str:
    return places.href(path, places.Target(place.page, place.anchor))


def told(place: places.Place) -> str:
    """The lines that a place names."""
    if not place.target.lines:
        return "the module"
    first, last = place.target.lines
    return f"lines {first}–{last}" if last > first else f"line {first}"
