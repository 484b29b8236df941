"""The book as a site: prose on the left, the code that it speaks of on the right.

    python tutorials/book/edition.py [--out tutorials/book/site]

Static pages in one folder, which need no network. It takes the pages of tutorials/, and whatever they link to.
"""

import argparse
import ast
import pathlib
import shutil
import sys

if __name__ == "__main__":  # the folder of a script is no place to import from; the folder above it is
    sys.path[0] = str(pathlib.Path(__file__).resolve().parents[1])

from book import listing, markup, pages, places, skin

HERE = pathlib.Path(__file__).resolve().parent


def build(out: pathlib.Path) -> list[pathlib.Path]:
    """Write the site into a folder, in the place of an older one; the files that it has. What is wrong with the pages
    is said in one ValueError, before anything is written."""
    if out.exists() and not (out.is_dir() and ((out / "sync.js").is_file() or not any(out.iterdir()))):
        raise ValueError(f"{out} is not a site of the book: choose a folder that is new or empty")
    made, others = collect()
    known = [place for path, page in made.items() if path.suffix == ".md" for place in page.mentions]
    titles = {path: page.title for path, page in made.items()}
    files: dict[pathlib.PurePosixPath, bytes] = {}
    for path, page in made.items():
        files[places.in_site(path)] = skin.whole(page, made).encode()
    for path in others:
        content = path.read_bytes()
        if path.suffix == ".py":
            mentions = [place for place in known if place.target.path == path]
            page = markup.Page(path, path.name, listing.module(path, mentions, titles.__getitem__))
            content = skin.whole(page, made).encode()
        files[places.in_site(path)] = content
    css = listing.styles() + (HERE / "theme.css").read_text(encoding="utf-8")
    files[pathlib.PurePosixPath("theme.css")] = css.encode()
    files[pathlib.PurePosixPath("sync.js")] = (HERE / "sync.js").read_bytes()
    if out.exists():
        shutil.rmtree(out)
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return [out / name for name in files]


def collect() -> tuple[dict[pathlib.Path, markup.Page], list[pathlib.Path]]:
    """The pages, those of the book first, and the other files of the site: all that a page links to, however far."""
    waiting = [page for folder in (pages.HERE, *skin.languages()) for page in skin.order(folder)]
    made: dict[pathlib.Path, markup.Page] = {}
    others, seen, problems = [], set(waiting), []
    for path in waiting:
        if path.suffix != ".md" and not path.is_dir():
            others.append(path)
            continue
        try:
            made[path] = markup.render(path, contents_of(path) if path.is_dir() else None)
        except ValueError as error:
            problems.append(f"{path.relative_to(places.ROOT)}: {error}")
            continue
        new = dict.fromkeys(target.path for target in made[path].targets if target.path not in seen)
        waiting += new  # the loop goes on over these
        seen.update(new)
    if problems:
        raise ValueError("\n".join(problems))
    return made, others


def contents_of(folder: pathlib.Path) -> str:
    """A folder as a page: its files, and what each module says of itself."""
    lines = [f"# `{folder.relative_to(places.ROOT).as_posix()}/`\n", "| file | what it is |\n| --- | --- |"]
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.name.startswith((".", "__pycache__")) or path == HERE / "site":
            continue
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path.suffix == ".py" else None
        first = (said or "").split("\n")[0].replace("|", "\\|")
        lines.append(f"| [`{path.name}{'/' * path.is_dir()}`]({path.name}) | {first} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make the HTML edition of the tutorials.")
    parser.add_argument(
        "--out", type=pathlib.Path, default=HERE / "site", help="a folder (default: tutorials/book/site)"
    )
    out = parser.parse_args(arguments).out
    try:
        written = build(out)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    size = sum(path.stat().st_size for path in written)
    print(f"{len(written)} files, {size / 1e6:.1f} MB, in {out}")
    print(f"open {(out / 'index.html').resolve().as_uri()} in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
