"""Stamps of sources: a committed report carries one, and a test sees when the code is no longer the one reported on."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Bare(ast.NodeTransformer):
    """Takes out what says nothing to the machine: docstrings and annotations."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        return node


def bare(source: str) -> str:
    """The code of a source without comments, docstrings and annotations."""
    return ast.dump(Bare().visit(ast.parse(source)))


def stamp(paths: Iterable[Path | str], without: Iterable[Path | str] = ()) -> str:
    """16 hexadecimal digits that change when the code of a Python file does, or the text of another file.

    Args:
        paths: files and folders, absolute or in the repository. Of a folder all Python files count.
        without: files that do not count.
    """
    files: set[Path] = set()
    for path in paths:
        whole = ROOT / path
        files |= set(whole.rglob("*.py")) if whole.is_dir() else {whole}
    files -= {ROOT / path for path in without}
    digest = hashlib.sha256()
    for file in sorted(files):
        text = file.read_text(encoding="utf-8")
        content = bare(text) if file.suffix == ".py" else text
        digest.update(f"{file.relative_to(ROOT).as_posix()}\n{content}\n".encode())
    return digest.hexdigest()[:16]
