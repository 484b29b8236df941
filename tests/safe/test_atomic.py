"""Ctrl-C at any line: the model is as it was, or the operation is done. Never something between.

The interrupt is the real one, SIGINT, raised when the n-th line of lora_ref is about to run. `STEP` says at how many
lines: every one would take minutes (INTERRUPTS=all).
"""

import copy
import linecache
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import lora_ref
from lora_ref import LoraConfig, PeftModel, get_peft_model
from lora_ref.safe.atomic import transaction


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """Also where the tests are started in the background, for which a shell has Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


PACKAGE = str(Path(lora_ref.__file__).parent)
POINTS = 10**9 if os.environ.get("INTERRUPTS") == "all" else 100  # of each operation, spread over all of its lines


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.up(x).relu()))


CONFIG: dict[str, Any] = {"r": 2, "target_modules": ["up", "down"], "modules_to_save": ["head"]}


def plain() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def adapted(init: Any = False) -> PeftModel:
    return get_peft_model(plain(), LoraConfig(**CONFIG, init_lora_weights=init))


def merged() -> PeftModel:
    model = adapted("pissa")
    model.merge_adapter()
    return model


def with_two() -> PeftModel:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up", "down"]))
    return model


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator) for _ in range(3)]


def eva(model: PeftModel) -> None:
    lora_ref.initialize_lora_eva_weights(model, batches(), forward_fn=lambda m, x: m(x), show_progress_bar=False)


def for_eva() -> PeftModel:
    return get_peft_model(plain(), LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights="eva"))


def prepare(method: str) -> Callable[[nn.Module], None]:
    def corda(model: nn.Module) -> None:
        config = LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights="corda")
        lora_ref.preprocess_corda(model, config, lambda: [model(x) for x in batches()], progress=False)

    def lora_ga(model: nn.Module) -> None:
        config = LoraConfig(r=2, target_modules=["up"], init_lora_weights="lora_ga")
        steps = lambda: [model(x).square().sum().backward() for x in batches()]  # noqa: E731
        lora_ref.preprocess_loraga(model, config, steps, progress=False)

    return {"corda": corda, "lora_ga": lora_ga}[method]


def weighted(model: PeftModel) -> None:
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both", combination_type="cat")


def run_disabled(model: PeftModel) -> None:
    with model.disable_adapter():
        model(batches()[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    adapted().save_pretrained(path)
    return path


# name: (how to make the model, what is interrupted)
OPERATIONS: dict[str, tuple[Callable[[], Any], Callable[[Any, Path], object]]] = {
    "adapt": (plain, lambda model, folder: get_peft_model(model, LoraConfig(**CONFIG))),
    "adapt by PiSSA": (
        plain,
        lambda model, folder: get_peft_model(model, LoraConfig(**CONFIG, init_lora_weights="pissa")),
    ),
    "load": (plain, lambda model, folder: PeftModel.from_pretrained(model, folder)),
    "load a second": (adapted, lambda model, folder: model.load_adapter(folder, "b")),
    "add": (adapted, lambda model, folder: model.add_adapter("b", LoraConfig(**CONFIG))),
    "switch": (with_two, lambda model, folder: model.set_adapter("other")),
    "delete": (with_two, lambda model, folder: model.delete_adapter("default")),
    "rename": (adapted, lambda model, folder: model.rename_adapter("default", "b")),
    "weighted": (with_two, lambda model, folder: weighted(model)),
    "disable": (with_two, lambda model, folder: run_disabled(model)),
    "disable while merged": (merged, lambda model, folder: run_disabled(model)),
    "merge": (lambda: adapted("pissa"), lambda model, folder: model.merge_adapter()),
    "unmerge": (merged, lambda model, folder: model.unmerge_adapter()),
    "merge and unload": (adapted, lambda model, folder: model.merge_and_unload()),
    "unload": (lambda: adapted("pissa"), lambda model, folder: model.unload()),
    "EVA": (for_eva, lambda model, folder: eva(model)),
    "CorDA": (plain, lambda model, folder: prepare("corda")(model)),
    "LoRA-GA": (plain, lambda model, folder: prepare("lora_ga")(model)),
}


def picture(model: nn.Module) -> list[Any]:
    """All that can be seen of a model: modules, tensors by their bytes, flags, hooks, and plain attributes."""
    seen: list[Any] = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = {k: v for k, v in vars(module).items() if not k.startswith("_") and not isinstance(v, torch.Tensor)}
        hooks = [len(v) for k, v in vars(module).items() if k.endswith("_hooks")]
        seen.append((name, type(module).__name__, sorted((k, shown(v)) for k, v in own.items()), hooks))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.numpy().tobytes()
        seen.append((name, tensor.requires_grad, tuple(tensor.shape), tensor.detach().numpy().tobytes(), grad))
    return seen


def shown(value: Any) -> str:
    """Plain values by their repr; initialisations that wait for their adapter by their names."""
    if isinstance(value, dict):
        return str({k: shown(v) for k, v in value.items()})
    return (
        repr(value)
        if isinstance(value, (int, float, str, list, bool, type(None), LoraConfig))
        else type(value).__name__
    )


def run(action: Callable[[], object], at: int) -> tuple[int, bool]:
    """Run it with a Ctrl-C before the line that is number `at`: (how many lines ran, was it interrupted?)"""
    lines = 0

    def on_line(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal lines
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        # the moment in which a clean-up is about to begin: no code can guard it (and at `try:` no signal comes)
        if event == "line" and line != "try:" and not line.startswith(("finish(", "atomic.finish(")):
            lines += 1
            if lines == at:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return on_line

    def on_call(frame: FrameType, event: str, arg: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        action()
        return lines, False
    except KeyboardInterrupt:
        return lines, True
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("name", OPERATIONS)
def test_ctrl_c_at_any_line_changes_nothing_or_comes_after_all_is_done(name: str, folder: Path) -> None:
    make, operate = OPERATIONS[name]
    template = make()
    started = picture(template)
    model = copy.deepcopy(template)
    torch.manual_seed(1)
    total, _ = run(lambda: operate(model, folder), at=-1)
    done = picture(model)
    assert total > 20 and (done != started or "disable" in name)
    interrupts = 0
    for at in range(1, total + 1, max(1, total // POINTS)):
        model = copy.deepcopy(template)
        torch.manual_seed(1)
        _, stopped = run(lambda model=model: operate(model, folder), at)
        interrupts += stopped
        now = picture(model)
        assert now in (started, done), f"line {at} of {total}"
        assert stopped or now == done
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert interrupts


# -- transactions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_transaction_that_fails_leaves_the_tree_as_it_was(error):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    net.notes = {"a": [1]}
    handle = net[0].register_forward_hook(lambda *args: None)
    hooks, weight, data = net[0]._forward_hooks, net[0].weight, net[0].weight.data
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(error), transaction(net):
        net.notes["b"] = 2
        net[0].weight.requires_grad_(False)
        net[0].weight.data = torch.zeros(2, 2)
        net[1].running_mean = torch.ones(2)
        net.register_buffer("extra", torch.ones(1))
        net[0]._forward_hooks.clear()
        net[1] = nn.Identity()
        raise error
    assert isinstance(net[1], nn.BatchNorm1d)
    assert net.notes == {"a": [1]}
    assert net[0].weight is weight
    assert weight.requires_grad
    assert weight.data_ptr() == data.data_ptr()
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net[0]._forward_hooks is hooks
    handle.remove()
    assert not hooks  # the handle still reaches the dict


def test_a_transaction_of_a_few_modules_gives_back_the_flags_of_parameters_in_others():
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt), transaction(net, modules=lambda: [net], flags=[other.weight]):
        net.left = other.weight.requires_grad_(False)
        raise KeyboardInterrupt
    assert other.weight.requires_grad and not hasattr(net, "left")


def test_a_transaction_that_succeeds_keeps_its_changes():
    net = nn.Sequential(nn.Linear(2, 2))
    with transaction(net):
        net[0] = nn.ReLU()
    assert isinstance(net[0], nn.ReLU)


def test_an_inner_transaction_leaves_undoing_to_the_outer_one():
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match="late"), transaction(net):
        with transaction(net[0]):
            net[0].weight.requires_grad_(False)
        net[1] = nn.Identity()
        raise ValueError("late")
    assert net[0].weight.requires_grad
    assert isinstance(net[1], nn.ReLU)
    with pytest.raises(ValueError, match="inside"), transaction(net[0]), transaction(net):
        net[1] = nn.Identity()  # not covered by the outer one
        raise ValueError("inside")
    assert isinstance(net[1], nn.ReLU)
