"""The conformance suite as a tool: its command, its reports, its pages, its plugin. (What it finds: test_spec.py.)"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from lora_ref.tools.cli import main
from spec_tests import causes, markdown, page, parallel, report, repros, smoke
from spec_tests.contract import (
    CLAIMS,
    Implementation,
    Layer,
    LayerSpec,
    LayerState,
    Model,
    ModelSpec,
    ModuleSpec,
    check_claims,
)
from spec_tests.engine import Result, examine, find, known_deviations, run, with_known
from spec_tests.registry import load

IMPL = f"{__name__}:Tiny"
GUIDE = (Path(report.__file__).parent / "README.md").read_text(encoding="utf-8")


class TinyLayer(Layer):
    def __init__(self, spec: LayerSpec) -> None:
        rng = np.random.default_rng(spec.seed)
        out, n_in = spec.W.shape
        bound = n_in**-0.5
        A, B = rng.uniform(-bound, bound, (spec.r, n_in)), np.zeros((out, spec.r))
        self.state = LayerState(spec.W, spec.b, A, B, spec.lora_alpha / spec.r)

    def read(self) -> LayerState:
        return self.state

    def forward(self, x: np.ndarray, train: bool = False, seed: int = 0) -> np.ndarray:
        W, b, A, B, s = self.state
        return x @ W.T + (0 if b is None else b) + s * (x @ A.T) @ B.T

    def write(self, A: np.ndarray, B: np.ndarray) -> None:
        self.state = self.state._replace(A=A, B=B)


class Tiny(Implementation):
    """LoRA in a dozen lines: the smallest adapter class that makes sense."""

    name = "tiny"
    claims = frozenset({"linear", "write", "float64", "float32", "alpha", "large_r"})

    def layer(self, spec: LayerSpec) -> Layer:
        return TinyLayer(spec)


class Doubled(Tiny):
    """Its scaling is twice what it must be."""

    name = "doubled"

    def layer(self, spec: LayerSpec) -> Layer:
        made = TinyLayer(spec)
        made.state = made.state._replace(scaling=2 * made.state.scaling)
        return made


class Crashing(Tiny):
    def layer(self, spec: LayerSpec) -> Layer:
        if spec.r > 2:
            raise MemoryError("no room")
        return TinyLayer(spec)


class OverClaiming(Tiny):
    claims = Tiny.claims | {"merge"}


class Transposing(Tiny):
    def layer(self, spec: LayerSpec) -> Layer:
        return TinyLayer(spec.but(W=spec.W.T))


def outcomes(implementation: Implementation, *ids: str, profile: str = "quick") -> dict[str, str]:
    found = run("nobody", implementation, lambda r: r.id in ids, profile)
    return {result.id: result.outcome for result in found}


def test_outcomes_of_small_implementations() -> None:
    ids = ("FORWARD-001", "SCALE-001", "MERGE-001", "FORWARD-004")
    good = {"FORWARD-001": "PASS", "SCALE-001": "PASS", "MERGE-001": "UNSUPPORTED", "FORWARD-004": "UNSUPPORTED"}
    assert outcomes(Tiny(), *ids) == good
    assert outcomes(Doubled(), *ids) == good | {"SCALE-001": "FAIL", "FORWARD-001": "FAIL"}
    assert outcomes(Crashing(), *ids) == good | {"SCALE-001": "ERROR", "FORWARD-001": "ERROR"}
    assert outcomes(OverClaiming(), *ids) == good | {"MERGE-001": "FAIL"}


def test_a_wrong_adapter_class_is_told_before_anything_is_tried() -> None:
    with pytest.raises(TypeError, match=r"the adapter class of tiny is wrong .* read\(\)\.W"):
        list(run("nobody", Transposing()))
    unknown = type("Unknown", (Tiny,), {"claims": Tiny.claims | {"flying"}})()
    with pytest.raises(TypeError, match="flying"):
        check_claims(unknown)
    none = type("None", (Tiny,), {"claims": frozenset({"write"})})()
    with pytest.raises(TypeError, match="claims no kind of layer"):
        smoke.check(none)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda s: s._replace(A=s.A.T), r"read\(\)\.A has the shape \(3, 1\), it must be \(1, 3\)"),
        (lambda s: s._replace(B=s.B.T), r"read\(\)\.B has the shape \(1, 2\), it must be \(2, 1\)"),
        (lambda s: s._replace(A=s.A.astype(np.float32)), r"A must be a float64 NumPy array, it is an array of float32"),
        (lambda s: s._replace(B=s.B.tolist()), r"B must be a float64 NumPy array, it is a list"),
        (lambda s: s._replace(scaling=np.float32(1)), r"scaling must be a float"),
        (lambda s: tuple(s), r"read\(\) must give a LayerState, it gave a tuple"),
    ],
)
def test_the_smoke_test_says_what_read_must_give(changed: Any, said: str) -> None:
    class Odd(Tiny):
        def layer(self, spec: LayerSpec) -> Layer:
            made = TinyLayer(spec)
            made.state = changed(made.state)
            return made

    with pytest.raises(TypeError, match=f"the adapter class of tiny is wrong .*{said}"):
        smoke.check(Odd())


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            lambda y: y.tolist(),
            r"linear: what forward\(x\) returns must be a float64 NumPy array, it is a list: convert it",
        ),
        (lambda y: y.astype(np.float32), r"what forward\(x\) returns must be .*, it is an array of float32"),
        (
            lambda y: y.T,
            r"what forward\(x\) returns has the shape \(2, 4\), it must be \(4, 2\), for x of shape \(4, 3\)",
        ),
    ],
)
def test_the_smoke_test_says_what_forward_must_give(output: Any, said: str) -> None:
    class OddLayer(TinyLayer):
        def forward(self, x: np.ndarray, train: bool = False, seed: int = 0) -> Any:
            return output(super().forward(x))

    class Odd(Tiny):
        def layer(self, spec: LayerSpec) -> Layer:
            return OddLayer(spec)

    with pytest.raises(TypeError, match=f"the adapter class of tiny is wrong .*{said}"):
        smoke.check(Odd())


def test_the_smoke_test_leaves_what_fails_inside_the_lora_to_the_requirements() -> None:
    class Failing(TinyLayer):
        def forward(self, x: np.ndarray, train: bool = False, seed: int = 0) -> np.ndarray:
            raise ArithmeticError("it is the LoRA that fails")

    class Odd(Tiny):
        def layer(self, spec: LayerSpec) -> Layer:
            return Failing(spec)

    smoke.check(Odd())
    assert outcomes(Odd(), "FORWARD-001") == {"FORWARD-001": "ERROR"}


class TinyModel(Model):
    def __init__(self, spec: ModelSpec) -> None:
        r, alpha = spec.config["r"], spec.config["lora_alpha"]
        ends = tuple(f".{name}" for name in spec.config["target_modules"])
        self.spec, self.layers = spec, dict[str, TinyLayer]()
        for name, module in spec.modules.items():
            if f".{name}".endswith(ends):
                self.layers[name] = TinyLayer(LayerSpec(module.kind, module.W, module.b, r=r, lora_alpha=float(alpha)))

    def adapted(self, adapter: str = "default") -> dict[str, tuple[int, float]]:
        return {name: (len(layer.state.A), layer.state.scaling) for name, layer in self.layers.items()}

    def read(self, module: str, adapter: str = "default") -> LayerState:
        return self.layers[module].read()

    def forward(self, x: np.ndarray, *others: Any, **named: Any) -> np.ndarray:
        for name, module in self.spec.modules.items():
            if name in self.layers:
                x = self.layers[name].forward(x)
            elif module.kind == "norm":
                x = x * module.W + (0 if module.b is None else module.b)
            else:
                x = x @ module.W.T + (0 if module.b is None else module.b)
        return x


class ModelsOnly(Implementation):
    """LoRA for whole models: there is no layer of its own."""

    name = "models"
    claims = frozenset({"linear", "model", "float32"})

    def model(self, spec: ModelSpec) -> Model:
        return TinyModel(spec)


class NoBase:
    """The same, but it does not inherit from `Implementation`."""

    name, claims, conventions = ModelsOnly.name, ModelsOnly.claims, ModelsOnly.conventions

    def version(self) -> str:
        return ""

    def model(self, spec: ModelSpec) -> Model:
        return TinyModel(spec)


@pytest.mark.parametrize("made", [ModelsOnly, NoBase])
def test_an_implementation_of_models_alone_is_accepted(made: type) -> None:
    for implementation in (made(), report.Watched(made())):
        found = list(run("nobody", implementation, lambda r: r.id in ("SCALE-001", "LAW-012"), "quick"))
        assert {(r.id, r.outcome, r.message) for r in found} == {
            ("SCALE-001", "UNSUPPORTED", "it has no layer of its own: it adapts whole models alone"),
            ("LAW-012", "PASS", ""),
        }


def test_a_requirement_that_takes_errors_for_refusals_does_not_pass_without_a_layer() -> None:
    sure = type("Sure", (ModelsOnly,), {"claims": ModelsOnly.claims | {"errors", "init:pissa"}})()
    assert examine("nobody", sure, load()["PISSA-007"], "quick").outcome == "UNSUPPORTED"


@pytest.mark.parametrize(
    ("method", "changed", "said"),
    [
        ("adapted", lambda found: {"up": found["up"]}, r"adapted\(\) must give {module: \(r, s\)} of up, down"),
        ("adapted", lambda found: {k: (1, 1) for k in found}, r"adapted\(\)\['up'\] must be \(r, s\)"),
        ("read", lambda state: state._replace(W=state.W.T), r"read\('up'\)\.W is "),
        ("read", lambda state: state._replace(A=state.A[0]), r"read\('up'\)\.A has the shape \(3,\)"),
        ("forward", lambda y: y.T, r"forward\(x\) returns has the shape \(4, 5\), it must be \(5, 4\)"),
        ("forward", lambda y: None, r"forward\(x\) returns must be a float64 NumPy array, it is a NoneType"),
    ],
)
def test_the_smoke_test_tries_a_model(method: str, changed: Any, said: str) -> None:
    def odd(self: TinyModel, *args: Any) -> Any:
        return changed(getattr(TinyModel, method)(self, *args))

    class Odd(ModelsOnly):
        def model(self, spec: ModelSpec) -> Model:
            return type("OddModel", (TinyModel,), {method: odd})(spec)

    smoke.check(ModelsOnly())
    with pytest.raises(TypeError, match=f"the adapter class of models is wrong .* model: .*{said}"):
        smoke.check(Odd())


def test_an_implementation_of_neither_layers_nor_models_is_told_what_to_write() -> None:
    class Neither(Implementation):
        claims = frozenset({"linear"})

    with pytest.raises(TypeError, match="has no method layer: write layer"):
        smoke.check(Neither())


def test_the_script_of_a_failure_fails_alone(tmp_path: Path) -> None:
    result = examine(f"{__name__}:Doubled", Doubled(), load()["SCALE-001"], "quick")
    assert result.outcome == "FAIL" and "must be" in result.message
    (tmp_path / "again.py").write_text(result.repro)
    again = subprocess.run(
        [sys.executable, str(tmp_path / "again.py")],
        capture_output=True, text=True, cwd=Path(__file__).parent, env={"PYTHONPATH": "."},
    )  # fmt: skip
    assert again.returncode == 1 and result.message in again.stderr


def same(one: Any, two: Any) -> bool:
    """Are they of one type, and equal bit for bit?"""
    if isinstance(one, np.generic):
        return same(one.item(), two)
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        return (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes())
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(two, field.name)) for field in dataclasses.fields(one))
    if isinstance(one, dict):
        return same(list(one.items()), list(two.items()))
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two) or (one != one and two != two)


def read_again(case: Any) -> tuple[Any, list[str]]:
    """What the script of a case makes of it, and the lines of the script."""
    text = repros.script("some.package:Implementation", "SCALE-001", "A sentence.", case)
    got: list[Any] = []
    exec(text.replace(", reproduce", ""), {"reproduce": lambda name, id, found: got.append(found)})
    return got[0], text.splitlines()


@pytest.mark.parametrize(
    "case",
    [
        None,
        (np.arange(3.0),),
        {"A": np.random.default_rng(0).standard_normal((9, 40)), "r": [1, (2,), ()]},
        np.random.default_rng(1).standard_normal((2, 3, 4, 5)).astype(np.float32),
        np.arange(2000),
        np.zeros((0, 3)),
        [np.array(3.5), np.array([-0.0, np.inf, -np.inf, np.nan]), np.float64(0.1), np.array([True, False])],
        LayerSpec("linear", np.eye(20), None, init_options={"inputs": [np.ones((30, 20)) / 3]}),
        (LayerSpec("linear", np.eye(2), np.ones(2), r=2), LayerState(np.eye(2), None, np.eye(2), np.eye(2), 1 / 3)),
        ModelSpec({"a.b": ModuleSpec("linear", np.eye(12))}, {"r": 1, "target_modules": ["a"] * 40}, order=["a.b"] * 3),
    ],
    ids=lambda case: type(case).__name__,
)
def test_the_script_of_a_case_has_short_lines_and_is_exact(case: Any) -> None:
    again, lines = read_again(case)
    assert same(case, again)
    assert max(map(len, lines)) <= 120


def test_large_arrays_are_written_row_by_row() -> None:
    _, lines = read_again({"A": np.ones((17, 4)), "B": np.ones((4, 4))})
    assert lines.count(" " * 8 + "[1.0, 1.0, 1.0, 1.0],") == 17
    assert sum(line.startswith("    'B': array([[1.0, 1.0, 1.0, 1.0], [1.0") for line in lines) == 1


def test_the_scripts_of_generated_cases_are_exact() -> None:
    plain, options = find("plain")[1], {"database": None, "deadline": None, "derandomize": True}

    def body(case: Any) -> None:
        again, lines = read_again(case)
        assert same(case, again) and max(map(len, lines)) <= 120

    for requirement in list(load().values())[::6]:
        given = hypothesis.given(case=requirement.given(plain))(body)
        hypothesis.settings(max_examples=2, suppress_health_check=list(hypothesis.HealthCheck), **options)(given)()


def test_the_same_run_twice_gives_the_same_results_and_another_seed_other_cases() -> None:
    requirement = load()["SCALE-001"]
    first, second = (examine("x", Doubled(), requirement, "quick") for _ in range(2))
    assert first == second
    seen: list[list[str]] = []
    for seed in (1, 1, 2):
        watched: list[str] = []

        class Watching(Tiny):
            def layer(self, spec: LayerSpec, watched: list[str] = watched) -> Layer:
                watched.append(repr(spec))
                return TinyLayer(spec)

        examine("x", Watching(), requirement, "quick", seed)
        seen.append(watched)
    assert seen[0] == seen[1] != seen[2]


def test_find_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"package\.module:Class, or one of lora_ref, "):
        find("nobody")
    with pytest.raises(ValueError, match="has no class Missing"):
        find(f"{__name__}:Missing")


class Few(Tiny):
    claims = frozenset({"linear", "transposed", "float32", "merge", "unload"})


def test_claims_for_which_nothing_was_tried_are_named_with_what_the_nearest_requirement_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched = report.Watched(Few())
    results = list(run("few", watched, lambda r: r.id in ("SCALE-001", "MERGE-001"), "quick"))
    made = report.make(watched, results, "quick", None, watched.covered)
    assert made["footer"]["untried"] == {"merge": "write is not claimed"}
    report.validate(made)
    older = json.loads(json.dumps(made))
    del older["footer"]["untried"]
    report.validate(older)
    made["footer"]["untried"]["merge"] = 3
    with pytest.raises(ValueError, match="untried: merge is 3"):
        report.validate(made)
    assert main(["check", f"{__name__}:Few", "--only", "MERGE-001", "--profile", "quick"]) == 0
    assert "\n  merge: nothing tried, write is not claimed\n" in capsys.readouterr().out


def test_a_kind_that_was_drawn_counts_as_tried_though_no_requirement_of_its_own_was() -> None:
    rows = [{"id": "SHAPE-001", "outcome": "UNSUPPORTED", "message": "claims none of these"}]
    assert report.untried({"linear"}, rows, {("kind", "linear")}) == {}
    assert report.untried({"linear"}, rows, set()) == {"linear": "claims none of these"}


def test_parts_that_are_put_together_leave_untried_what_none_of_them_tried() -> None:
    def part(id: str, outcome: str) -> report.Report:
        return report.make(Few(), [Result(id, outcome, "s", "s")], "quick")

    needy = ("MERGE-001", "UNSUPPORTED"), ("MERGE-003", "UNSUPPORTED"), ("SHAPE-001", "PASS")
    merged = {id: report.merge([part("MERGE-002", "UNSUPPORTED"), part(id, how)])[0] for id, how in needy}
    assert [list(made["footer"]["untried"]) for made in merged.values()] == [
        ["merge"],
        ["merge"],
        ["merge"],
    ]


# -- known deviations --------------------------------------------------------------------------


def listed(tmp_path: Path, text: str) -> str:
    (tmp_path / "some.toml").write_text(text)
    return str(tmp_path / "some")


def test_known_deviations_are_strict(tmp_path: Path) -> None:
    requirements = load()
    good = '[[deviation]]\nid = "SCALE-001"\nreason = "doubled"\nlink = "https://example.org/1"\n'
    known = known_deviations(listed(tmp_path, good), requirements)
    failing = examine("x", Doubled(), requirements["SCALE-001"], "quick")
    passing = examine("x", Tiny(), requirements["SCALE-001"], "quick")
    assert with_known(failing, known["SCALE-001"]).outcome == "KNOWN"
    stale = with_known(passing, known["SCALE-001"])
    assert stale.outcome == "ERROR" and "take it off the list" in stale.message
    assert with_known(passing, known["SCALE-001"], "quick").outcome == "PASS"  # few examples may miss it
    with pytest.raises(ValueError, match="no requirement 'SCALE-999'"):
        known_deviations(listed(tmp_path, good.replace("001", "999")), requirements)
    with pytest.raises(ValueError, match="SCALE-001 has no reason"):
        known_deviations(listed(tmp_path, good.replace("doubled", "")), requirements)


def test_a_listed_requirement_that_fails_by_another_cause_fails(tmp_path: Path) -> None:
    requirements = load()
    failing = examine("x", Doubled(), requirements["SCALE-001"], "quick")
    cause = '[[cause]]\nreason = "{}"\nids = ["SCALE-001"]\nsays = ["{}"]\n'
    causes = cause.format("one", "{}") + cause.format("two", "{}")
    begins = failing.message[:6]
    assert begins
    known = known_deviations(listed(tmp_path, causes.format("what no message says", begins)), requirements)
    assert with_known(failing, known["SCALE-001"]).reason == "two"
    known = known_deviations(listed(tmp_path, causes.format("a", "b")), requirements)
    other = with_known(failing, known["SCALE-001"])
    assert other.outcome == "FAIL" and "another failure than what is listed: one; two" in other.message


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, Path, str]:
    monkeypatch.chdir(tmp_path)
    arguments = ["check", IMPL, f"{__name__}:Doubled", "--only", "SCALE", "FORWARD-001", "--profile", "quick"]
    code = main([*arguments, "--report", "r.json", "--html", "m.html"])
    return code, tmp_path, capsys.readouterr().out


def test_the_command_shows_and_writes_what_it_found(found: tuple[int, Path, str]) -> None:
    code, folder, said = found
    assert code == 1
    assert "SCALE-001: s = lora_alpha / r." in said and "reproduce(" in said
    first, second = report.read(folder / "r.json")
    assert first["footer"]["counts"]["FAIL"] == 0 < second["footer"]["counts"]["FAIL"]
    assert first["footer"]["covered"]["options"] >= 4
    assert set(first["results"][0]) >= {"id", "outcome", "sentence", "examples", "max_error_u", "message", "repro"}
    assert first["footer"]["headline"] in said


def test_several_processes_find_what_one_finds_in_the_same_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for jobs in ("1", "3"):  # each in a process of its own: Hypothesis draws constants of what is imported, too
        arguments = [IMPL, f"{__name__}:Doubled", "--only", "SCALE", "FORWARD", "--profile", "quick", "--jobs", jobs]
        code = "import sys; from lora_ref.tools.cli import main; sys.exit(main())"
        line = [sys.executable, "-c", code, "check", *arguments, "--report", str(tmp_path / jobs)]
        assert subprocess.run(line, cwd=Path(__file__).parent, capture_output=True).returncode == 1
        texts.append((tmp_path / jobs).read_text())
    assert texts[0] == texts[1] and "SCALE-001" in texts[0]
    ids = ["SCALE-002", "FORWARD-001", "SCALE-001"]  # a report sorts them, the runs keep this order
    found = [result.id for result, _ in parallel.run(IMPL, Tiny(), ids, "quick", None, 2)]
    assert found == ids
    assert main(["check", f"{__name__}:Transposing", "--jobs", "2"]) == 1  # refused before any process begins
    assert "adapter class" in capsys.readouterr().err


def test_the_command_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "nobody"]) == 2 and "package.module:Class" in capsys.readouterr().err
    assert main(["check", IMPL, "--only", "NOWHERE"]) == 2 and "there is no such area" in capsys.readouterr().err
    assert main(["check", f"{__name__}:Transposing"]) == 1 and "adapter class" in capsys.readouterr().err


def test_the_command_passes_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", IMPL, "--only", "SCALE-001", "--profile", "quick"]) == 0
    assert "claims 1 of 1, passes 1 of 1" in capsys.readouterr().out
    assert main(["check", "plain", "--only", "SCALE-001", "--profile", "quick"]) == 0
    assert "plain: claims 1 of 1, passes 1 of 1" in capsys.readouterr().out
    assert main(["check", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(id in shown for id in load())


# -- the report --------------------------------------------------------------------------------


def broken(change: Callable[[report.Report], object]) -> report.Report:
    results = [examine("x", Tiny(), load()[id], "quick") for id in ("SCALE-001", "FORWARD-001")]
    made = report.make(Tiny(), results, "quick")
    change(made)
    return made


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda r: r.pop("footer"), "no 'footer'"),
        (lambda r: r["results"][0].update(outcome="MAYBE"), "MAYBE"),
        (lambda r: r["results"][0].update(id="scale 1"), "no id"),
        (lambda r: r["results"].append(r["results"][0]), "twice"),
        (lambda r: r["results"][0].update(outcome="FAIL"), "counts"),
        (lambda r: r["footer"].update(headline="passes all"), "headline"),
        (lambda r: r["footer"].update(profile="lenient"), "profile"),
        (lambda r: r["footer"].update(seed="1"), "seed"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(change: Callable[[report.Report], object], says: str) -> None:
    report.validate(broken(lambda r: None))
    with pytest.raises(ValueError, match=says):
        report.validate(broken(change))


def test_parts_of_a_run_are_put_together(tmp_path: Path) -> None:
    first, second = (
        report.make(Tiny(), [examine("x", Tiny(), load()[id], "quick")], "quick") for id in ("SCALE-001", "FORWARD-001")
    )
    (whole,) = report.merge([first, second])
    assert [result["id"] for result in whole["results"]] == ["FORWARD-001", "SCALE-001"]
    report.validate(whole)
    with pytest.raises(ValueError, match="reported on twice: SCALE-001"):
        report.merge([first, first])
    report.write(tmp_path / "r.json", [whole])
    assert report.read(tmp_path / "r.json") == [whole]
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        report.read(tmp_path / "r.json")


# -- the pages ---------------------------------------------------------------------------------


def test_the_page_shows_every_failure_and_loads_nothing(found: tuple[int, Path, str]) -> None:
    text = (found[1] / "m.html").read_text()
    failed = [r for made in report.read(found[1] / "r.json") for r in made["results"] if r["outcome"] == "FAIL"]
    assert text.count("<dialog ") == len(failed) > 0
    assert not re.search(r"""(src|href)=["']?(https?:|//)""", text)
    assert page.page(report.read(found[1] / "r.json")) == text


def test_hostile_text_stays_text(found: tuple[int, Path, str]) -> None:
    reports = report.read(found[1] / "r.json")
    bad = next(r for r in reports[1]["results"] if r["outcome"] == "FAIL")
    bad |= {"message": "</pre><script>alert(1)</script>", "link": "javascript:alert(1)", "reason": "a|b `c` <b>"}
    shown = page.page(reports)
    assert "<script>alert" not in shown and "javascript:" not in shown
    text = markdown.page(reports)
    assert "<script>" not in text and "javascript" not in text and r"a\|b \`c\` &lt;b>" in text


def test_the_page_and_the_markdown_open_with_areas_and_end_with_requirements(found: tuple[int, Path, str]) -> None:
    reports = report.read(found[1] / "r.json")
    shown = page.page(reports)
    places = [shown.index(part) for part in ('id="areas"', 'id="deviations"', 'id="requirements"', 'id="rows"')]
    assert places == sorted(places)
    assert "doubled, SCALE: keeps 1 of 4 tried, of 9 requirements" in shown
    text = markdown.page(reports)
    heads = re.findall(r"^## (.*)", text, re.M)
    assert heads == ["Areas", "Deviations by cause", "Summary", "Requirements that do not hold"]


def deviating(*rows: tuple[str, str, str, str]) -> report.Report:
    """A report with results of (id, outcome, reason, script)."""
    results = [
        Result(id, outcome, "It holds.", f"{causes.DECISION}: so", reason=reason) for id, outcome, reason, _ in rows
    ]
    made = report.make(Tiny(), results)
    for result, row in zip(made["results"], rows, strict=True):
        result["script"] = row[3]
    return made


def test_deviations_of_one_reason_are_one_cause_with_its_script() -> None:
    made = deviating(
        ("AREA-001", "KNOWN", "it forgets", "x/forgets.py"),
        ("AREA-002", "PASS", "", ""),
        ("AREA-003", "KNOWN", "it forgets", "x/forgets.py"),
        ("AREA-004", "KNOWN", "it is late", ""),
        ("AREA-005", "FAIL", "", ""),
        ("AREA-006", "FAIL", "", ""),
    )
    listed = [(c.outcome, c.reason, c.script, [r["id"] for r in c.results]) for c in causes.causes(made)]
    assert listed == [
        ("FAIL", "", "", ["AREA-005"]),
        ("FAIL", "", "", ["AREA-006"]),
        ("KNOWN", "it forgets", "x/forgets.py", ["AREA-001", "AREA-003"]),
        ("KNOWN", "it is late", "", ["AREA-004"]),
    ]
    shown, text = page.page([made]), markdown.page([made])
    assert "5 deviations, 4 causes" in shown and "spec_tests/known/x/forgets.py" in shown
    assert shown.count(">own decision<") == 6 and "Their source is lora_ref's decision" in text
    assert "KNOWN, AREA-001, AREA-003: it forgets. Script: [`x/forgets.py`]" in text


def test_the_scripts_of_a_list_are_found_by_their_reasons_and_a_path_is_no_name() -> None:
    there = causes.scripts("peft")
    assert there and all((causes.KNOWN / script).is_file() for script in there.values())
    assert causes.scripts("../known/peft") == causes.scripts("nobody") == {}
    made = deviating(("AREA-001", "KNOWN", "odd", "](javascript:1) <b>"))
    assert [cause.script for cause in causes.causes(made)] == [""]


def test_what_is_not_promised_is_said_by_its_claims() -> None:
    shown = page.page(
        [report.make(Tiny(), [Result("AREA-001", "UNSUPPORTED", "It holds.", "a paper", message="no x")])]
    )
    assert "tiny: not promised, no x" in shown and "<code>merge</code>: merges the update into the weight" in shown
    assert "tiny, AREA: nothing is promised" in shown


def test_the_share_of_an_area_is_rounded_down() -> None:
    rows = [{"outcome": "PASS"}] * 199 + [{"outcome": "KNOWN"}]
    assert causes.share(rows, 300).percent == 99 and causes.share(rows[:-1], 300).percent == 100
    assert causes.share([], 3) == (0, 0, 3) and causes.share([], 3).percent == 0


def test_markdown_is_the_same_for_the_same_reports(found: tuple[int, Path, str]) -> None:
    reports = report.read(found[1] / "r.json")
    assert markdown.page(reports) == markdown.page(json.loads(json.dumps(reports))) == markdown.page(reports[::-1])
    assert "**SCALE-001, FAIL.**" in markdown.page(reports)


# -- pytest ------------------------------------------------------------------------------------


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An adopter's repository."""
    text = Path(__file__).read_text()
    start, end = text.index("class TinyLayer"), text.index("class Crashing")
    head = (
        "import numpy as np\nfrom spec_tests import Implementation, Layer, LayerSpec, LayerState, install\n"
        "from spec_tests.contract import Layer, LayerState\n"
    )
    (tmp_path / "adopter.py").write_text(head + text[start:end])
    (tmp_path / "test_adopter.py").write_text(
        "from adopter import Tiny\nfrom spec_tests import install\n\ninstall(globals(), Tiny, profile='quick')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def test_pytest_pyargs_runs_the_suite_on_an_implementation(elsewhere: Path) -> None:
    common = ("--pyargs", "spec_tests", "--lora-profile", "quick", "-k", "SCALE")
    good = pytest_in(elsewhere, *common, "--lora-impl", "adopter:Tiny", "--lora-report", "r.json")
    assert good.returncode == 0, good.stdout + good.stderr
    (made,) = report.read(elsewhere / "r.json")
    assert made["implementation"]["name"] == "tiny" and made["footer"]["counts"]["FAIL"] == 0
    bad = pytest_in(elsewhere, *common, "--lora-impl", "adopter:Doubled")
    assert bad.returncode == 1 and "FAIL SCALE-001" in bad.stdout and "reproduce(" in bad.stdout
    (elsewhere / "k.toml").write_text('[[deviation]]\nid = "SCALE-001"\nreason = "doubled"\n')
    known = pytest_in(elsewhere, *common[:-1], "SCALE-001", "--lora-impl", "adopter:Doubled", "--lora-known", "k.toml")
    assert known.returncode == 0 and "1 xfailed" in known.stdout


def test_pytest_says_what_is_missing(elsewhere: Path) -> None:
    assert "1 skipped" in pytest_in(elsewhere, "--pyargs", "spec_tests").stdout
    wrong = pytest_in(elsewhere, "--pyargs", "spec_tests", "--lora-impl", "nobody")
    assert wrong.returncode == 4 and "package.module:Class" in wrong.stderr
    lonely = pytest_in(elsewhere, "--lora-profile", "quick")
    assert lonely.returncode == 4 and "without --lora-impl" in lonely.stderr


def test_install_puts_the_suite_into_a_repository_of_ones_own(elsewhere: Path) -> None:
    ran = pytest_in(elsewhere, "test_adopter.py", "-k", "SCALE_001 or MERGE_001")
    assert "1 passed, 1 skipped" in ran.stdout, ran.stdout


@pytest.mark.parametrize(("number", "name", "least"), [(0, "MyLora", 10), (1, "MyModels", 40)])
def test_the_guides_examples_work_as_they_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str, least: int
) -> None:
    module = f"example_{number}_of_the_guide"
    (tmp_path / f"{module}.py").write_text(GUIDE.split("```python\n")[number + 1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["check", f"{module}:{name}", "--profile", "quick", "--report", str(tmp_path / "r.json")]) == 0
    (made,) = report.read(tmp_path / "r.json")
    assert made["footer"]["counts"]["PASS"] >= least


def test_the_guide_has_a_claim_for_every_method_of_the_contract() -> None:
    said = GUIDE.split("## Methods and claims")[1].split("\n## ")[0]
    layers, models = said.split("| `Model` |")
    for kind, table in ((Layer, layers), (Model, models)):
        named = set(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in table.splitlines() if "|" in row[1:])))
        methods = {name for name in vars(kind) if not name.startswith("_")}
        assert methods <= named, methods - named
    claims = re.findall(r"`([a-z_]+)`", "".join(row.split("|")[2] for row in said.splitlines() if row.count("|") == 3))
    assert {*claims} <= CLAIMS.keys()
