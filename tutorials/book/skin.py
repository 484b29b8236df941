"""What is around the text of every page of the site: the head, the contents, the pages before and after, the pane."""

import pathlib
import string
from html import escape

from book import markup, pages, places, words

TEMPLATE = string.Template((pathlib.Path(__file__).parent / "page.html").read_text(encoding="utf-8"))
PANE = """<aside class="pane" aria-label="{pane}">
<button type="button">{close}</button>
<iframe name="code" title="{pane}" src="{first}" loading="lazy"></iframe>
</aside>
"""
Made = dict[pathlib.Path, markup.Page]


def languages() -> list[pathlib.Path]:
    """The folders of pages in other languages: tutorials/vi/."""
    return sorted({page.parent for page in pages.HERE.glob("[a-z][a-z]/*.md")})


def order(folder: pathlib.Path) -> list[pathlib.Path]:
    """The pages of one language, as they are read: the contents, the numbered pages, the others."""
    first, numbered = [page for page in [folder / "README.md"] if page.is_file()], pages.all_pages(folder)
    return [*first, *numbered, *sorted({*folder.glob("*.md")} - {*first, *numbered})]


def whole(page: markup.Page, made: Made) -> str:
    """A page as a file of HTML. What is no page of the book, such as a module, has the English contents around it."""
    here, said = page.source, words.of(places.language(page.source))
    in_book = here.suffix == ".md" and here.parent in (pages.HERE, *languages())
    chapters = order(here.parent if in_book else pages.HERE)
    code = next((place.target for place in page.mentions if place.target.in_package), None)
    menu = "".join(f"<li>{entry(page, path, made)}</li>\n" for path in chapters)
    turns, relations = turned(page, chapters, said)
    return TEMPLATE.substitute(
        said,
        lang=places.language(here),
        title=escape(page.title if here == chapters[0] else f"{page.title} · {said['book']}"),
        root="../" * (len(places.in_site(here).parts) - 1),
        relations=relations,
        kind="module" if here.suffix == ".py" else "beside" if code else "alone",
        home=link(page, chapters[0]),
        menu=f"<ol>\n{menu}</ol>\n",
        turns=turns + translations(page, made),
        body=page.body,
        pane=PANE.format_map(said | {"first": places.href(here, code)}) if code else "",
    )


def link(page: markup.Page, path: pathlib.Path, anchor: str = "") -> str:
    return places.href(page.source, places.Target(path, anchor))


def entry(page: markup.Page, path: pathlib.Path, made: Made) -> str:
    """A page in the contents; of the page that one is at, the sections, too."""
    if path != page.source:
        return f'<a href="{link(page, path)}">{escape(made[path].title)}</a>'
    sections = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>\n' for anchor, heading in page.sections)
    inner = f"\n<ul>\n{sections}</ul>\n" if sections else ""
    return f'<a href="{link(page, path)}" aria-current="page">{escape(page.title)}</a>{inner}'


def turned(page: markup.Page, chapters: list[pathlib.Path], said: dict[str, str]) -> tuple[str, str]:
    """Links to the pages before and after, for the reader and for the browser."""
    turns = relations = ""
    here = chapters.index(page.source) if page.source in chapters else len(chapters) + 1
    for relation, at, sign, word in (("prev", here - 1, "←", "previous"), ("next", here + 1, "→", "next")):
        if 0 <= at < len(chapters):
            href = link(page, chapters[at])
            turns += f'<a rel="{relation}" href="{href}" title="{said[word]}" aria-label="{said[word]}">{sign}</a>\n'
            relations += f'<link rel="{relation}" href="{href}">\n'
    return turns, relations


def translations(page: markup.Page, made: Made) -> str:
    """The same page in other languages."""
    folders = [folder for folder in (pages.HERE, *languages()) if folder != page.source.parent]
    same = [folder / page.source.name for folder in folders if page.source.parent in (pages.HERE, *languages())]
    tongues = {path: places.language(path) for path in same if path in made}
    return "".join(
        f'<a hreflang="{tongue}" lang="{tongue}" href="{link(page, path)}">{words.of(tongue)["language"]}</a>\n'
        for path, tongue in tongues.items()
    )
