"""What is where in lora_ref, what imports what, and what an import costs.

The rooms stand in one order. A module imports its own room and the rooms before it, also inside of functions.
"""

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import pytest
from imports import IN_ROOMS, MODULES, PACKAGE, ROOMS, graph, imported, imports_of, module_of, room_of

import lora_ref

CORE_IMPORTS = {"numpy", "torch", "jaxtyping"}  # beside the standard library
# these run on NumPy without torch; numerics, init and the options of the files are imported with them
CONCEPTS = [
    "lora_ref",
    *(f"lora_ref.core.{name}" for name in ("scaling", "update", "inits", "config", "names")),
    *(f"lora_ref.numerics.{name}" for name in ("arrays", "dense", "leading", "pca", "quantization")),
    *(f"lora_ref.safe.{name}" for name in ("regexes", "strict")),
    "lora_ref.init",
    "lora_ref.files.config_file",
    *(f"lora_ref.api.{name}" for name in ("combination", "default_targets")),
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# -- what is where ---------------------------------------------------------------------------------


def sources(room: str = "") -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py"))


def lines_of(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_at_the_top_are_rooms_only() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert found == {"__init__.py", "py.typed", *ROOMS}


def test_the_core_is_read_in_one_sitting() -> None:
    modules = [path for path in sources("core") if path.name != "__init__.py"]
    assert len(modules) <= 9
    assert all(path.parent == PACKAGE / "core" for path in modules)
    assert lines_of(sources("core")) <= 1600


def test_the_package_without_its_surface_and_its_tools_is_small() -> None:
    """What users of PEFT call (api), and the commands, grow with what they offer."""
    outside = [*sources("api"), *sources("tools")]
    assert lines_of([path for path in sources() if path not in outside]) < 6500


# -- what imports what -----------------------------------------------------------------------------


def wrong_way(module: str, imports: set[str]) -> list[str]:
    """The imports of a module that are of a later room. Only the tools, as a user does, import from lora_ref itself."""
    allowed = {*ROOMS[: ROOMS.index(room_of(module)) + 1], *([""] if room_of(module) == "tools" else [])}
    return sorted(other for other in imports if room_of(other) not in allowed)


@pytest.mark.parametrize("module", IN_ROOMS)
def test_imports_go_one_way(module: str) -> None:
    assert wrong_way(module, graph()[module]) == []


def test_no_modules_import_each_other() -> None:
    """Not through others either: two modules of one room could."""
    try:
        order = list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
    assert set(IN_ROOMS) <= set(order)


@pytest.mark.parametrize("module", [name for name in IN_ROOMS if room_of(name) == "core"])
def test_the_core_imports_only_numpy_torch_and_itself(module: str) -> None:
    others = {name.split(".")[0] for name in imports_of(module)} - {"lora_ref"}
    assert others <= CORE_IMPORTS | sys.stdlib_module_names
    assert {room_of(other) for other in graph()[module]} <= {"core"}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from ..api.model import LoraModel", ["lora_ref.api.model"]),
        ("from .. import api", ["lora_ref.api"]),
        ("from ..api import model, weighted", ["lora_ref.api.model", "lora_ref.api.weighted"]),
        ("import lora_ref.tools.cli", ["lora_ref.tools.cli"]),
        ("from lora_ref import get_peft_model", ["lora_ref"]),
        ("def f():\n    from ..api.model import LoraModel", ["lora_ref.api.model"]),
        ("import importlib\nimportlib.import_module('lora_ref.api.model')", ["lora_ref.api.model"]),
        ("from ..core.update import delta\nfrom ..numerics import pca\nfrom .strict import strict", []),
    ],
)
def test_an_import_of_a_later_room_is_found(line: str, found: list[str]) -> None:
    names = {module_of(name) for name in imported(line, "lora_ref.safe.regexes")} - {None}
    assert wrong_way("lora_ref.safe.regexes", names) == found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_names_transformers_or_peft_in_an_import(module: str) -> None:
    """But for AutoPeftModel, which loads base models with transformers. As tested below, no import brings it along."""
    libraries = {name.split(".")[0] for name in imports_of(module)} & {"transformers", "peft"}
    assert libraries == ({"transformers"} if module == "lora_ref.api.auto" else set())


# -- what an import costs --------------------------------------------------------------------------


FORBIDDEN = "{m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'peft', 'safetensors', 'rich')}"


def test_every_concept_imports_without_torch() -> None:
    """In one process, module by module, so that the first to bring torch along is named."""
    code = f"import importlib, sys\nfor name in {CONCEPTS}:\n    importlib.import_module(name)\n"
    assert run(code + f"    assert not {FORBIDDEN}, name\nprint('none')") == "none"


def test_the_concepts_run_on_numpy_without_torch() -> None:
    code = f"""
import sys, numpy as np
from lora_ref import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, PeftConfig, TaskType, init, numerics
from lora_ref.api import combination
from lora_ref.core import names, scaling, update
from lora_ref.files import config_file
rng = np.random.default_rng(0)
W, x = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))
s = scaling.scaling(2, 4)
def near(got, want, terms, size):  # both are such sums, of float64 numbers
    return (abs(got - want) <= 2 * terms * 2.0**-53 * size).all()
def adds_up(residual, A, B):
    return near(residual + s * B @ A, W, 2 + 3, abs(residual) + s * abs(B) @ abs(A))
for value in (True, False, "gaussian", "orthogonal", "pissa", "pissa_niter_2", "olora", "loftq", "mica"):
    A, B, residual, exact = init.find(value, "linear")(W, 2, s, rng)
    assert A.shape == (2, 4) and B.shape == (6, 2) and (residual is None) is (value not in (
        "pissa", "pissa_niter_2", "olora", "loftq"))
    assert residual is None or not exact or adds_up(residual, A, B)
A, B, residual, _ = init.find("corda", "linear")(W, 2, s, rng, covariance=x.T @ x)
assert adds_up(residual, A, B)
A, B, residual, _ = init.find("lora_ga", "linear")(W, 2, s, rng, gradient=W[::-1])
assert adds_up(residual, A, B)
D = update.delta(A, B, s)
U, S, Vh = numerics.svd(W)
assert near(U * S @ Vh, W, 8 * W.size, S[0])  # roundings of a decomposition (Higham, 19.4, with 8 for c)
for name in ("cat", "linear", "svd"):
    extra = dict(r=2) if name == "svd" else dict()
    A2, B2, *_ = combination.COMBINATIONS[name]([A], [B], [s], **extra)
    assert near(B2 @ A2, D, 3 * 8 * W.size, s * np.linalg.norm(B) * np.linalg.norm(A))  # and of three
config = LoraConfig(target_modules=["q"], rank_pattern={{"q": 2}})
assert config_file.from_dict(config.to_dict()) == config
plan = names.resolve(names.ModelNames({{"a.q": "linear", "a.k": "linear"}}), config)
assert plan.names("adapt") == ["a.q"] and plan.matches[0].r == 2
assert names.Rule("rank_pattern", {{"q": 2}}).match("a.q") == "q"
print(sorted({FORBIDDEN}))
"""
    assert run(code) == "[]"


def test_names_that_need_torch_come_when_asked_for() -> None:
    code = """
import sys, lora_ref
assert "torch" not in sys.modules and "PeftModel" in dir(lora_ref) and "torch" not in sys.modules
from lora_ref import get_peft_model
assert "torch" in sys.modules
print(sorted(m for m in sys.modules if m.split(".")[0] in ("transformers", "peft")))
"""
    assert run(code) == "[]"


def test_what_is_slow_to_import_comes_when_it_is_used() -> None:
    """SciPy's parts and rich each take longer than all of lora_ref."""
    new = "import sys, torch; old = {*sys.modules}; from lora_ref import get_peft_model; print(*{*sys.modules} - old)"
    slow = ("scipy.", "sklearn", "rich", "matplotlib", "transformers", "torch._dynamo", "torch.distributed")
    loaded = run(new).split()
    assert "lora_ref.numerics.leading" in loaded
    assert not [name for name in loaded if name.startswith(slow)]


def test_every_module_imports_without_transformers_and_peft() -> None:
    figures = [] if find_spec("matplotlib") else ["lora_ref.tools.demo.figure"]  # it needs an extra
    names = [name for name in MODULES if name not in figures]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    assert run(code + "print([m for m in ('transformers', 'peft') if m in sys.modules])") == "[]"


# -- public names ----------------------------------------------------------------------------------


def test_dir_lists_the_public_names_and_all_of_them_exist() -> None:
    assert dir(lora_ref) == sorted(lora_ref.__all__)
    assert all(getattr(lora_ref, name) is not None for name in lora_ref.__all__)
    assert lora_ref.PeftConfig is lora_ref.LoraConfig


def test_an_unknown_name_is_an_attribute_error_with_the_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'get_peft_modle'"):
        lora_ref.get_peft_modle  # noqa: B018


def test_names_are_found_where_peft_has_them() -> None:
    pytest.importorskip("peft")
    code = """
import importlib, lora_ref
for module in ("config", "helpers", "mapping", "optimizers", "peft_model", "tuners.lora", "utils"):
    theirs, ours = importlib.import_module(f"peft.{module}"), importlib.import_module(f"lora_ref.{module}")
    assert eval(f"lora_ref.{module}") is ours
    shared = [name for name in lora_ref.__all__ if hasattr(theirs, name)]
    assert shared, f"PEFT has none of the names in {module}"
    for name in shared:
        assert getattr(ours, name) is getattr(lora_ref, name)
    try:
        exec(f"from lora_ref.{module} import nothing")
    except ImportError as error:
        assert "cannot import name 'nothing'" in str(error)
        print(module)
"""
    assert run(code).split() == ["config", "helpers", "mapping", "optimizers", "peft_model", "tuners.lora", "utils"]
