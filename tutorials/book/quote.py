"""Code of lora_ref in the prose, filled in by cog, so that it cannot drift from the module.

In a page:

    <!-- [[[cog from book.quote import quote; quote("lora_ref.core.layer", "LoraLayer.forward") ]]] -->
    <!-- [[[end]]] -->

and from the repository's root: `python -m cogapp -P -r -I tutorials tutorials/*.md`.
"""

import ast
import os
import pathlib
import re
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[2]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def quote(module: str, dotted_name: str | None = None) -> None:
    """Print a link to the lines of a function, class, method or assignment, and its code without docstrings."""
    path = path_of(module)
    first, last, code = excerpt(path.read_text(encoding="utf-8"), dotted_name)
    shown = path.relative_to(ROOT).as_posix()
    lines = f"lines {first}–{last}" if last > first else f"line {first}"
    print(f"[`{shown}`, {lines}]({link_to(path)}#L{first}-L{last})\n")
    # in place of the formatter: dedented code would be wrapped otherwise than in its module
    print(f"<!-- fmt: off -->\n```py\n{code}\n```\n<!-- fmt: on -->")


def path_of(module: str) -> pathlib.Path:
    """The file of a module of this repository, which is not imported for it."""
    stem = ROOT / module.replace(".", "/")
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no module {module} in {ROOT}")


def link_to(path: pathlib.Path) -> str:
    """The path as seen from the page that cog is at work on (from tutorials/ where cog is not)."""
    page = getattr(sys.modules.get("cog"), "inFile", None)
    start = pathlib.Path(page).resolve().parent if page else ROOT / "tutorials"
    return pathlib.Path(os.path.relpath(path, start)).as_posix()


def excerpt(source: str, dotted_name: str | None = None) -> tuple[int, int, str]:
    """First line, last line, and the code between them, dedented and without docstrings."""
    if dotted_name is None:
        first, last = 1, len(source.splitlines())
    else:
        node = find(ast.parse(source), dotted_name)
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        last = node.end_lineno
    return first, last, textwrap.dedent("\n".join(code_lines(source, first, last).values()))


def code_lines(source: str, first: int, last: int) -> dict[int, str]:
    """The lines from first to last by number: without docstrings, and without blank lines at both ends."""
    lines = dict(enumerate(source.splitlines(), start=1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, Definition | ast.Module) and ast.get_docstring(node, clean=False) is not None:
            start, end = node.body[0].lineno, node.body[0].end_lineno
            stub = " " * node.body[0].col_offset + "..."
            is_all = len(node.body) == 1 and not isinstance(node, ast.Module)
            if not is_all and not lines.get(end + 1, "code").strip():
                end += 1  # the blank line that parts a docstring from the code
            for number in range(start, end + 1):
                del lines[number]
            if is_all:
                lines[start] = stub
    kept = [number for number in sorted(lines) if first <= number <= last]
    while kept and not lines[kept[0]].strip():
        del kept[0]
    while kept and not lines[kept[-1]].strip():
        del kept[-1]
    return {number: lines[number] for number in kept}


def find(tree: ast.Module, dotted_name: str) -> ast.stmt:
    """The statement that defines a name: of several (overloads), the last."""
    node: ast.Module | ast.stmt = tree
    for part in dotted_name.split("."):
        found = [child for child in getattr(node, "body", []) if part in names_of(child)]
        if not found:
            raise LookupError(f"nothing is called {dotted_name} (looking for {part})")
        node = found[-1]
    return node


def names_of(statement: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(statement, Definition):
        return [statement.name]
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def modules(*names: str) -> None:
    """Print a table of modules: how long each is, and the first sentence of its docstring."""
    print("| module | lines | what it is |\n| --- | ---: | --- |")
    for name in names:
        path = path_of(f"lora_ref.{name}")
        source = path.read_text(encoding="utf-8")
        said = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0].replace("|", "\\|")
        said = re.sub(r"(`[^`]*`)|_", lambda m: m[1] or r"\_", said)  # within backticks nothing is escaped
        print(f"| [`{name.replace('.', '/')}`]({link_to(path)}) | {len(source.splitlines())} | {said} |")
