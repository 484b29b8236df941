"""What importing costs, and what imports what: the concepts run on NumPy without torch, and data flows one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_ref

PACKAGE = Path(lora_ref.__file__).parent
CONCEPTS = [
    "lora_ref",
    "lora_ref.core.scaling",
    "lora_ref.core.update",
    "lora_ref.safe.regexes",
    "lora_ref.core.names",
    "lora_ref.api.default_targets",
    "lora_ref.core.config",
    "lora_ref.core.config",
    "lora_ref.core.names",
    "lora_ref.numerics",
    "lora_ref.numerics.quantization",
    "lora_ref.numerics.pca",
    "lora_ref.init",
    "lora_ref.api.combination",
    "lora_ref.files.config_file",
]
# a module imports nothing that stands in a later line; within a line there is no order
ORDER = [
    {"scaling", "decomposition", "regexes", "architectures", "linalg", "options", "progress"},
    {"patterns", "quantization", "pca"},
    {"config", "config_file"},  # LoraConfig.from_pretrained reads the file
    {"targeting", "init", "combination"},
    {"wrappers", "atomic", "sharded", "watch", "covariance", "gradients"},
    {"formula"},
    {"weights", "fused", "rows"},
    {"layer"},
    {"layers"},
    {"parameters"},
    {"bias"},
    {"merge"},
    {"inject"},
    {"checks"},
    {"weighted"},
    {"adapters"},
    {"switch"},
    {"model"},
    {"slots"},
    {"conversion", "folder"},
    {"storage"},
    {"peft_model"},
    {"eva_pass"},
    {"prepare", "eva"},
    {"spectrum", "inspect_figure", "inspect", "plan", "demo"},
    {"cli"},
]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


FORBIDDEN = "{m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'peft', 'safetensors', 'rich')}"


def test_every_concept_imports_without_torch() -> None:
    """In one process, module by module, so that the first to bring torch along is named."""
    code = f"import importlib, sys\nfor name in {CONCEPTS}:\n    importlib.import_module(name)\n"
    assert run(code + f"    assert not {FORBIDDEN}, name\nprint('none')") == "none"


def test_the_concepts_run_on_numpy_without_torch() -> None:
    code = f"""
import sys, numpy as np
from lora_ref import LoraConfig, EvaConfig, LoftQConfig, CordaConfig, TaskType, PeftConfig
from lora_ref import combination, config_file, decomposition, init, linalg, patterns, scaling, targeting
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
D = decomposition.delta(A, B, s)
assert decomposition.parameter_count(W.shape, 2) == 20
U, S, Vh = numerics.svd(W)
assert near(U * S @ Vh, W, 8 * W.size, S[0])  # roundings of a decomposition (Higham, 19.4, with 8 for c)
for name in ("cat", "linear", "svd"):
    extra = dict(r=2) if name == "svd" else dict()
    A2, B2, *_ = combination.COMBINATIONS[name]([A], [B], [s], **extra)
    assert near(B2 @ A2, D, 3 * 8 * W.size, s * np.linalg.norm(B) * np.linalg.norm(A))  # and of three
config = LoraConfig(target_modules=["q"], rank_pattern={{"q": 2}})
assert config_file.from_dict(config_file.to_dict(config)) == config
plan = targeting.resolve(targeting.ModelNames({{"a.q": "linear", "a.k": "linear"}}), config)
assert plan.names("adapt") == ["a.q"] and plan.matches[0].r == 2
assert patterns.PatternDict("rank_pattern", {{"q": 2}}).key("a.q") == "q"
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


def test_dir_lists_the_public_names_and_all_of_them_exist() -> None:
    assert dir(lora_ref) == sorted(lora_ref.__all__)
    assert all(getattr(lora_ref, name) is not None for name in lora_ref.__all__)
    assert lora_ref.PeftConfig is lora_ref.LoraConfig


def test_an_unknown_name_is_an_attribute_error_with_the_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'get_peft_modle'"):
        lora_ref.get_peft_modle  # noqa: B018


def test_every_module_imports_without_transformers_and_peft() -> None:
    names = [f"lora_ref.{path.stem}" for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    assert run(code + "print([m for m in ('transformers', 'peft') if m in sys.modules])") == "[]"


def top(path: Path) -> str:
    """The module of the package that a file belongs to: init/random.py to init."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The modules of lora_ref that a file imports, anywhere in it, except for type checkers."""
    package = ["lora_ref", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            # "from . import a, b" names modules, "from .a import f" does not
            found |= {".".join([*base, alias.name]) for alias in node.names} if len(base) == 1 else {".".join(base)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("lora_ref.")}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_one_below_it(path: Path) -> None:
    place = {name: number for number, names in enumerate(ORDER) for name in names}
    own = top(path)
    assert own in place, f"{own} has no place in the order yet"
    for name in (imported(path) & place.keys()) - {own}:
        assert place[name] <= place[own], f"{own} imports {name}, which stands below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_names_transformers_or_peft_in_an_import(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not {name.split(".")[0] for name in names} & {"transformers", "peft"}
