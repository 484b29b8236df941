"""Every known deviation was seen a second time, in another instance; those of PEFT were written from the reasons."""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import spec_tests

KNOWN = Path(spec_tests.__file__).parent / "known"
LISTS = {path.stem: tomllib.loads(path.read_text()) for path in sorted(KNOWN.glob("*.toml"))}
HERE = ("peft", "transformers", "loralib")  # what this environment has
PEERS = KNOWN.parents[1] / ".peers"  # and the others, where `make peers` has been
INSIDE = """
import runpy, sys
for path in sys.argv[2:]:
    made = runpy.run_path(path)
    for name in sys.argv[1].split():
        if callable(made.get(name)):
            made[name]()
"""


def modules(name: str) -> list[Path]:
    """The files with the second instances of a library's deviations."""
    found = (KNOWN / "second").glob(f"of_{name}*.py")
    return sorted(path for path in found if path.stem.removeprefix(f"of_{name}")[:1] in ("", "_"))


def functions(path: Path) -> list[ast.FunctionDef]:
    """The functions of a file that take no arguments: each is an instance, or gives a model to some."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return [node for node in found if not node.args.args and not node.args.vararg]


def stems(name: str) -> list[str]:
    """What the scripts of a library's causes are called."""
    return [Path(cause["script"]).stem for cause in LISTS[name]["cause"]]


@pytest.mark.parametrize("name", LISTS)
def test_each_cause_says_what_was_seen_the_second_time(name: str) -> None:
    for cause in LISTS[name]["cause"]:
        said = cause["checked"]
        assert 40 < len(said) < 240 and "\n" not in said and said != cause["reason"], cause["script"]
    assert len({cause["checked"] for cause in LISTS[name]["cause"]}) == len(LISTS[name]["cause"])


@pytest.mark.parametrize("name", LISTS)
def test_each_script_has_one_second_instance_that_asserts(name: str) -> None:
    made = [node for path in modules(name) for node in functions(path)]
    instances = {node.name: node for node in made if isinstance(node.returns, ast.Constant)}  # -> None
    assert sorted(instances) == sorted(set(stems(name)))
    for node in instances.values():
        assert any(isinstance(inner, ast.Assert | ast.Raise) for inner in ast.walk(node)), node.name
        assert (node.end_lineno or 0) - node.lineno < 25, node.name


@pytest.mark.parametrize("path", sorted((KNOWN / "second").glob("*.py")), ids=lambda path: path.stem)
def test_no_instance_uses_anything_of_this_project(path: Path) -> None:
    text = path.read_text()
    assert "lora_ref" not in text and "spec_tests" not in text and any(path in modules(name) for name in LISTS)


@pytest.mark.parametrize(("name", "script"), [(name, script) for name in HERE for script in sorted(set(stems(name)))])
@pytest.mark.filterwarnings("ignore")
def test_the_second_instance_shows_it(name: str, script: str, instances: dict[str, dict[str, object]]) -> None:
    if LISTS[name]["version"] != f"{name} {version(name)}":
        pytest.skip(f"the list is about {LISTS[name]['version']}")
    shown = instances[name][script]
    assert callable(shown)
    shown()


@pytest.fixture(scope="module")
def instances() -> dict[str, dict[str, object]]:
    """{library: {function: it}}, of the libraries of this environment."""
    return {name: {k: v for path in modules(name) for k, v in runpy.run_path(str(path)).items()} for name in HERE}


@pytest.mark.parametrize("name", [name for name in LISTS if name not in HERE])
def test_both_instances_show_it_in_the_library_s_own_environment(name: str) -> None:
    python = PEERS / name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"make peers ARGS={name}")
    paths = [*sorted((KNOWN / name).glob("*.py")), *modules(name)]
    line = [str(python), "-W", "ignore", "-c", INSIDE, " ".join(stems(name)), *map(str, paths)]
    quiet = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(line, capture_output=True, text=True, env=quiet, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_false_instance_would_be_seen(tmp_path: Path) -> None:
    for text, code in (
        ("def wrong() -> None:\n    assert 1 > 2\n", 1),
        ("def right() -> None:\n    assert 2 > 1\n", 0),
    ):
        (tmp_path / "of_x.py").write_text(text)
        line = [sys.executable, "-c", INSIDE, "wrong right", str(tmp_path / "of_x.py")]
        assert subprocess.run(line, capture_output=True).returncode == code
