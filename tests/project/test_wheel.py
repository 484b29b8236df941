"""The wheel, in an environment with its dependencies and nothing else: what promises to work does, the rest says so.

The environment is new; the dependencies, and theirs, are linked into it from this one. So no network is needed, and
what only an extra brings is not there.
"""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from spec_tests import agree, distance

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def build(source: Path, out: Path, kind: str) -> Path:
    line = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(out)]
    done = subprocess.run(line, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(archive.read(name))


def asked_for(lines: list[str], extra: str = "") -> set[str]:
    found = (Requirement(line) for line in lines)
    return {canonicalize_name(f.name) for f in found if f.marker is None or f.marker.evaluate({"extra": extra})}


def closure(names: set[str]) -> dict[str, importlib.metadata.Distribution]:
    """These distributions, and all that they need."""
    found: dict[str, importlib.metadata.Distribution] = {}
    while missing := names - found.keys():
        for name in missing:
            found[name] = importlib.metadata.distribution(name)
            names = names | asked_for(found[name].requires or [])
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, set[str]]]:
    """Makes an environment with the wheel and one extra (or none): its bin/, and what is linked into it."""
    wanted = metadata(wheel).get_all("Requires-Dist") or []

    def make(extra: str = "") -> tuple[Path, set[str]]:
        place = tmp_path_factory.mktemp("environment")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
        python = place / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
        subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = place / "lib" / version / "site-packages"
        linked = closure(asked_for(wanted, extra))
        for distribution in linked.values():
            tops = {path.parts[0] for path in distribution.files or [] if path.parts[0] != ".."} - {"__pycache__"}
            for top in tops:
                if not (packages / top).exists():
                    (packages / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
        return place / "bin", set(linked)

    return make


def runner(programs: Path, folder: Path) -> Run:
    """Run a program of the environment, or code in it, in this folder, without this environment's variables."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}

    def run(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
        line = [str(programs / "python"), "-c", code] if code else [str(programs / words[0]), *words[1:]]
        return subprocess.run(line, cwd=folder, env=clean, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def bare(environment: Callable[..., tuple[Path, set[str]]]) -> tuple[Path, set[str]]:
    return environment()


@pytest.fixture
def run(bare: tuple[Path, set[str]], tmp_path: Path) -> Run:
    return runner(bare[0], tmp_path)


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert archive.read("lora_ref-0.1.0.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert not any(str(ROOT).encode() in archive.read(name) for name in names)
    assert {name.split("/")[0] for name in names} == {"lora_ref", "spec_tests", "lora_ref-0.1.0.dist-info"}
    junk = re.compile(
        r"(^|/)(tests|tutorials|benchmarks|__pycache__|\.[^/]+)/|\.(pyc|so|log|orig|rej|swp|egg-info)$|~$"
    )
    assert [name for name in names if junk.search(name)] == []
    listed = subprocess.run(["git", "ls-files", "lora_ref", "spec_tests"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:  # a checkout: the wheel has each of its files
        left_out = ("spec_tests/reports/", "spec_tests/bugs/")
        assert {name for name in listed.stdout.splitlines() if not name.startswith(left_out)} <= set(names)
        assert not [name for name in names if name.startswith(left_out)]
    assert "lora_ref/py.typed" in names
    assert wheel.stat().st_size < 2**20


def test_the_metadata(wheel: Path) -> None:
    about = metadata(wheel)
    assert wheel.name == "lora_ref-0.1.0-py3-none-any.whl"
    assert (about["Name"], about["Version"], about["License-Expression"]) == ("lora_ref", "0.1.0", "Apache-2.0")
    assert about["Requires-Python"] == ">=3.11" and about["Description-Content-Type"] == "text/markdown"
    assert set(about.get_all("Provides-Extra") or []) == {
        *("demo", "peers", "quantized", "tutorials", "spec", "test", "mutation", "dev")
    }
    known = {"torch", "numpy", "scipy", "threadpoolctl", "safetensors", "rich", "regex", "jaxtyping"}
    assert asked_for(about.get_all("Requires-Dist") or []) == known
    with zipfile.ZipFile(wheel) as archive:
        scripts = archive.read("lora_ref-0.1.0.dist-info/entry_points.txt").decode()
    assert "lora-ref = lora_ref.tools.cli:main" in scripts and "spec_tests.plugin = spec_tests.plugin" in scripts


def test_the_sdist_is_enough_to_build_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(ROOT, tmp_path, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build(tmp_path / "lora_ref-0.1.0", tmp_path / "again", "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {i.filename: i.CRC for i in other.infolist()}


def test_the_environment_has_the_dependencies_and_nothing_else(
    wheel: Path, bare: tuple[Path, set[str]], run: Run
) -> None:
    code = "import importlib.metadata as m\nfor found in m.distributions(): print(found.name)"
    there = {canonicalize_name(name) for name in run(code=code).stdout.split()}
    assert there == bare[1] | {"lora-ref"}
    absent = ("matplotlib", "sklearn", "peft", "transformers", "loralib", "hypothesis", "pytest", "beartype", "cogapp")
    code = f"import importlib.util as u; print([name for name in {absent} if u.find_spec(name)])"
    assert run(code=code).stdout.strip() == "[]"
    assert str(bare[0].parent) in run(code="import lora_ref; print(lora_ref.__file__)").stdout


IMPORTS = """
import importlib, pkgutil, warnings
for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
    warnings.filterwarnings("error", category=kind, module="lora_ref")
import lora_ref
for found in pkgutil.walk_packages(lora_ref.__path__, "lora_ref."):
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        print(found.name, error.name)
"""


def test_every_module_imports_but_the_one_that_draws_the_demo(run: Run) -> None:
    done = run(code=IMPORTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["lora_ref.tools.demo.figure matplotlib"]


TRAINING = """
import json
import torch
from lora_ref import LoraConfig, PeftModel, get_peft_model

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)).double()

x = torch.ones(3, 8).double()
model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"]))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(2):
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()
model.save_pretrained("adapter")
again = PeftModel.from_pretrained(net(), "adapter")
assert torch.equal(again(x), model(x))
models = {"base": net(), "trained": model, "merged": again.merge_and_unload()}
with open("outputs.json", "w") as file:
    json.dump({name: model(x).tolist() for name, model in models.items()}, file)
"""


def test_an_adapter_trains_is_saved_and_loaded_and_inspected(run: Run, tmp_path: Path) -> None:
    done = run(code=TRAINING)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    outputs = json.loads((tmp_path / "outputs.json").read_text())  # compared here: the environment has no spec_tests
    agree(outputs["merged"], outputs["trained"])
    assert distance(outputs["base"], outputs["trained"]) > 0.01
    for words in (["inspect", "adapter"], ["inspect", "adapter", "--json"], ["plan"], ["--help"], ["--version"]):
        done = run("lora-ref", *words)
        assert done.returncode == 0 and done.stdout and not done.stderr, (words, done.stderr)
    said_to_need(run("lora-ref", "inspect", "adapter", "--figure", "x.png"), "matplotlib", "demo")


def said_to_need(done: subprocess.CompletedProcess[str], package: str, extra: str) -> None:
    """It ends with one sentence that names the package and the extra."""
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1, done.stderr
    assert package in done.stderr and f"pip install 'lora_ref[{extra}]'" in done.stderr


@pytest.mark.parametrize(
    ("words", "package", "extra"),
    [(["demo"], "matplotlib", "demo"), (["check"], "hypothesis", "spec"), (["check", "peft"], "hypothesis", "spec")],
)
def test_what_needs_an_extra_says_which(words: list[str], package: str, extra: str, run: Run, tmp_path: Path) -> None:
    said_to_need(run("lora-ref", *words), package, extra)
    assert list(tmp_path.iterdir()) == []


def test_with_the_extra_spec_the_suite_runs_and_its_peers_say_what_they_need(
    environment: Callable[..., tuple[Path, set[str]]], tmp_path: Path
) -> None:
    run = runner(environment("spec")[0], tmp_path)
    done = run("lora-ref", "check", "--only", "SCALE", "--profile", "quick")
    assert done.returncode == 0 and "SCALE" in done.stdout, done.stderr
    for package in ("peft", "loralib"):
        said_to_need(run("lora-ref", "check", package), package, "peers")
