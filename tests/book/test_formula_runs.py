"""The formula that page 1 quotes is the code that runs, and a call passes through few functions.

The quotes are read from the page. A debugger stops at each of their lines.
"""

from __future__ import annotations

import bdb
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ref
from lora_ref import LoraConfig, get_peft_model
from lora_ref.core.model import LoraModel

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tutorials"))
from book import quote  # noqa: E402

PAGE = ROOT / "tutorials" / "01_one_layer.md"
QUOTE = re.compile(r'quote\("([\w.]+)", "([\w.]+)"\)')
FORMULA = "lora_B(lora_A("

Line = tuple[str, int]  # file, number
Call = Callable[[Any], object]


@dataclass(frozen=True)
class Quote:
    """A function that the page quotes."""

    module: str
    name: str
    path: pathlib.Path
    code: dict[int, str]  # {number: text}, without the docstring

    @property
    def lines(self) -> set[Line]:
        """The lines of its body at which a debugger can stop."""
        [first, *inner] = sorted(self.code)
        stops = {number for code in code_objects(self.path) for _, _, number in code.co_lines()}
        body = [number for number in inner if not self.code[number].startswith(")")]  # a signature of several lines
        assert self.code[first].lstrip().startswith("def ")
        return {(str(self.path), number) for number in body if number in stops}


def quotes() -> list[Quote]:
    found = []
    for module, name in QUOTE.findall(PAGE.read_text(encoding="utf-8")):
        path = quote.path_of(module)
        source = path.read_text(encoding="utf-8")
        first, last, _ = quote.excerpt(source, name)
        found.append(Quote(module, name, path, quote.code_lines(source, first, last)))
    return found


def code_objects(path: pathlib.Path) -> Iterator[types.CodeType]:
    """The code of all functions of a file."""
    waiting = [compile(path.read_text(encoding="utf-8"), str(path), "exec")]
    while waiting:
        code = waiting.pop()
        inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
        waiting += inner
        yield from (one for one in inner if one.co_flags & 0x2)  # CO_NEWLOCALS: a function, not a class


class Debugger(bdb.Bdb):
    """It stops at breakpoints, notes where it is, and continues."""

    def __init__(self, breakpoints: set[Line]) -> None:
        super().__init__()
        self.stops: set[Line] = set()
        for path, number in breakpoints:
            assert self.set_break(path, number) is None, (path, number)

    def user_line(self, frame: types.FrameType) -> None:
        self.stops.add((frame.f_code.co_filename, frame.f_lineno))
        self.set_continue()


def stops(breakpoints: set[Line], call: Call, model: Any) -> set[Line]:
    """The breakpoints at which call(model) stops."""
    before, debugger = sys.gettrace(), Debugger(breakpoints)
    try:
        debugger.runcall(call, model)
    finally:
        debugger.clear_all_breaks()
        sys.settrace(before)
    return debugger.stops & breakpoints


# -- the quoted lines --------------------------------------------------------------------------------

X = torch.ones(2, 4)


def core(config: LoraConfig) -> LoraModel:
    model = LoraModel(nn.Sequential(nn.Linear(4, 3)))
    model.add_adapter("default", config)
    model.set_adapter("default")
    return model


def plain(config: LoraConfig) -> lora_ref.PeftModel:
    return get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)


def hooked(config: LoraConfig) -> lora_ref.PeftModel:
    """`fast` leaves a layer to the core if something observes lora_A."""
    model = plain(config)
    model.lora_layers()["0"].lora_A["default"].register_forward_hook(lambda module, inputs, output: None)
    return model


def forward(model: Any) -> Tensor:
    return model(X)


def disabled(model: Any) -> Tensor:
    with model.disable_adapter():
        return model(X)


def mixed(model: Any) -> Tensor:
    with model.eval().mixed_batch(["default", "__base__"]):
        return model(X)


def merged(model: Any) -> Tensor:
    """It calls the quoted `delta`: `fast` merges an adapter that subtracts its start as the core does."""
    model.merge_adapter()
    return model(X)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "with dropout": {"lora_dropout": 0.5},
    "from an update that is not 0": {"init_lora_weights": "pissa"},
}


def config(**options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["0"], **options)


def test_the_page_quotes_the_update_and_the_layer():
    assert [(q.module, q.name) for q in quotes()] == [
        ("lora_ref.core.update", "delta"),
        *(("lora_ref.core.layer", f"LoraLayer.{name}") for name in ("forward", "add_branches", "branch")),
    ]
    assert sum(FORMULA in text for q in quotes() for text in q.code.values()) == 1
    assert all(q.lines for q in quotes())


@pytest.mark.parametrize("make", [core, hooked])
def test_a_breakpoint_on_the_quoted_formula_is_hit(make):
    formula = {(str(q.path), n) for q in quotes() for n, text in q.code.items() if FORMULA in text}
    assert stops(formula, forward, make(config())) == formula


@pytest.mark.parametrize("make", [core, hooked])
def test_every_quoted_function_of_the_layer_is_entered(make):
    for q in quotes():
        if q.module == "lora_ref.core.layer":
            assert stops(q.lines, forward, make(config())), q.name


@pytest.mark.parametrize("make, make_to_merge", [(core, core), (hooked, plain)])  # with a hook, merging is refused
def test_every_quoted_line_runs_in_one_of_the_calls_that_the_page_names(make, make_to_merge):
    all_lines = set().union(*(q.lines for q in quotes()))
    reached: set[Line] = set()
    for options in OPTIONS.values():
        for call in (forward, disabled, mixed):
            reached |= stops(all_lines, call, make(config(**options)))
        reached |= stops(all_lines, merged, make_to_merge(config(**options)))
    assert reached == all_lines


def test_where_nothing_observes_the_factors_the_quoted_lines_do_not_run():
    in_layer = set().union(*(q.lines for q in quotes() if q.module == "lora_ref.core.layer"))
    assert stops(in_layer, forward, plain(config())) == set()


# -- how far it is to the formula ------------------------------------------------------------------------


def functions(call: Callable[[], object]) -> set[tuple[str, str]]:
    """(file, qualified name) of the functions of lora_ref that a call enters, without comprehensions and lambdas."""
    package, found = str(pathlib.Path(lora_ref.__file__).parent), set()

    def note(frame: types.FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and not code.co_name.startswith("<"):
            found.add((code.co_filename.removeprefix(package), code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def files(found: set[tuple[str, str]]) -> set[str]:
    return {path for path, _ in found}


def test_a_call_of_the_cores_model_passes_through_eight_functions_in_three_files():
    model = core(config())
    found = functions(lambda: model(X))
    assert any(name == "LoraLayer.branch" for _, name in found)
    assert len(found) <= 8 and len(files(found)) <= 3, sorted(found)


def test_get_peft_model_passes_through_75_functions_in_14_files():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    wanted = LoraConfig(r=4, target_modules=["0", "2"])
    found = functions(lambda: get_peft_model(net, wanted))
    assert any(name == "LoraLayer.add_adapter" for _, name in found)
    assert len(found) <= 75 and len(files(found)) <= 14, sorted(found)
