"""The modules of lora_ref, and what each imports: read from the sources, so that an import in a function counts."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import lora_ref

PACKAGE = Path(lora_ref.__file__).parent
#: A module imports its own room and the rooms before it.
ROOMS = ("core", "numerics", "safe", "init", "fast", "files", "api", "calibration", "tools")


def name_of(path: Path) -> str:
    """The module in a file: lora_ref.core.layer, or lora_ref.init for init/__init__.py."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
IN_ROOMS = [name for name in MODULES if name != "lora_ref"]


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """The modules and names that a source imports, with absolute names, in functions too."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant))


def imports_of(name: str) -> set[str]:
    path = MODULES[name]
    return set(imported(path.read_text(encoding="utf-8"), name, path.name == "__init__.py"))


def module_of(name: str) -> str | None:
    """The module of lora_ref that an imported name is, or is in: `lora_ref.core.update.delta` is in core.update."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


@cache
def graph() -> dict[str, set[str]]:
    """{module: the modules of lora_ref that it imports}."""
    found = {name: {module_of(other) for other in imports_of(name)} for name in IN_ROOMS}
    return {name: {other for other in others if other} - {name} for name, others in found.items()}


def room_of(module: str) -> str:
    """The room that a module is in: "" for lora_ref/__init__.py, which has names of all rooms."""
    return f"{module}.".split(".")[1]
