"""Where the files of the repository are in the site, and how one of them is written as a link in another.

The pages of tutorials/ are at its root, everything else is under code/, by its path in the repository:

    tutorials/README.md                 index.html
    tutorials/01_one_layer.md           01_one_layer.html
    tutorials/figures/01_shapes.png     figures/01_shapes.png
    lora_ref/core/layer.py              code/lora_ref/core/layer.html
    lora_ref/                           code/lora_ref/index.html
    spec_tests/README.md                code/spec_tests/README.md.html
    spec_tests/vectors/schema.json      code/spec_tests/vectors/schema.json
"""

import os
import pathlib
import re
from dataclasses import dataclass

from book import pages

ROOT = pages.HERE.parent
LINES = re.compile(r"L(\d+)(?:-L(\d+))?")


@dataclass(frozen=True)
class Target:
    """What a link of a page leads to."""

    path: pathlib.Path  # in the repository
    anchor: str = ""

    @property
    def lines(self) -> tuple[int, int] | None:
        """First and last line, of a link to lines of a file."""
        found = LINES.fullmatch(self.anchor)
        return (int(found[1]), int(found[2] or found[1])) if found else None

    @property
    def is_code(self) -> bool:
        return self.path.suffix == ".py"

    @property
    def in_package(self) -> bool:
        return self.is_code and self.path.is_relative_to(ROOT / "lora_ref")


@dataclass(frozen=True)
class Place:
    """A link to code, seen from the code: where in the book one reads about it."""

    page: pathlib.Path
    anchor: str
    target: Target


def resolve(page: pathlib.Path, href: str) -> Target | None:
    """What a link in a page (or a folder) leads to; None for the web, and for places in the page itself."""
    if re.match(r"[a-z]+:|//|#", href):
        return None
    relative, _, anchor = href.partition("#")
    path = (page if page.is_dir() else page.parent).joinpath(relative).resolve()
    if not path.exists() or not path.is_relative_to(ROOT):
        raise ValueError(f"the link {href} leads to no file of the repository")
    return Target(path, anchor)


def in_site(path: pathlib.Path) -> pathlib.PurePosixPath:
    """The file of the site that shows a file, or a folder, of the repository."""
    in_code = pathlib.PurePosixPath("code", path.relative_to(ROOT).as_posix())
    if path.is_dir():
        return in_code / "index.html"
    if path.suffix == ".py":
        return in_code.with_suffix(".html")
    is_page = path.suffix == ".md"
    if not path.is_relative_to(pages.HERE):
        return in_code.with_name(f"{path.name}.html") if is_page else in_code
    in_book = pathlib.PurePosixPath(path.relative_to(pages.HERE).as_posix())
    return in_book.with_name("index.html" if path.stem == "README" else f"{path.stem}.html") if is_page else in_book


def href(start: pathlib.Path, target: Target) -> str:
    """A link to the target as it is written in the page made of `start`."""
    relative = os.path.relpath(in_site(target.path), in_site(start).parent)
    return pathlib.PurePosixPath(relative).as_posix() + (f"#{target.anchor}" if target.anchor else "")


def language(page: pathlib.Path) -> str:
    """Pages in another language are in a folder of its name: tutorials/vi/."""
    folder = page.parent.name
    return folder if page.parent.parent == pages.HERE and re.fullmatch("[a-z]{2}", folder) else "en"
