"""Code of lora_ref in the prose, filled in by cog, so that it cannot drift from the module.

In a page:

    <!-- [[[cog from book.quote import quote; quote("lora_ref.layer", "LoraLayer.forward") ]]] -->
    <!-- [[[end]]] -->

and from the repository's root: `python -m cogapp -P -r -I tutorials tutorials/*.md`.
"""

import ast
import os
import pathlib
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
    lines = source.splitlines()
    tree = ast.parse(source)
    node = tree if dotted_name is None else find(tree, dotted_name)
    if isinstance(node, ast.Module):
        first, last = 1, len(lines)
    else:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        last = node.end_lineno
    dropped: set[int] = set()
    for inner in ast.walk(node):
        if isinstance(inner, Definition | ast.Module) and ast.get_docstring(inner, clean=False) is not None:
            start, end = inner.body[0].lineno, inner.body[0].end_lineno
            dropped |= set(range(start, end + 1))
            if len(inner.body) == 1 and not isinstance(inner, ast.Module):
                lines[start - 1] = " " * inner.body[0].col_offset + "..."
                dropped.discard(start)
            elif end < len(lines) and not lines[end].strip():
                dropped.add(end + 1)  # the blank line that parts a docstring from the code
    kept = [lines[n - 1] for n in range(first, last + 1) if n not in dropped]
    return first, last, textwrap.dedent("\n".join(kept)).strip("\n")


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
        said = (ast.get_docstring(ast.parse(source)) or "").split("\n")[0].replace("|", "\\|").replace("_", "\\_")
        print(f"| [`{name.replace('.', '/')}`]({link_to(path)}) | {len(source.splitlines())} | {said} |")
