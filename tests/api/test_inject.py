"""Adapters in a model without a wrapper, and adapters whose numbers are replaced: as in PEFT."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import Snapshot, randomise
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from torch import nn

import lora_ref
from lora_ref import LoraConfig, PeftModel, get_peft_model
from lora_ref.api.hotswap import hotswap_adapter
from lora_ref.api.inject import inject_adapter_in_model
from spec_tests import agree

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.linspace(-1, 1, 12).double().reshape(3, 4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 2)).double()


def options(**more: Any) -> dict[str, Any]:
    return {"r": 2, "lora_alpha": 6, "target_modules": ["0", "2"]} | more


def filled(model: Any, seed: int = 0) -> Any:
    """Numbers that depend on the parameter's name alone."""
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.manual_seed(seed + sum(map(ord, name.removeprefix("base_model.model."))))
            parameter.data = torch.randn(parameter.shape).to(parameter)
    return model


def test_an_injected_model_is_pefts() -> None:
    found = []
    for library, inject in ((peft, peft.inject_adapter_in_model), (lora_ref, inject_adapter_in_model)):
        base = net()
        model = inject(library.LoraConfig(**options(modules_to_save=["3"])), base, "mine")
        assert model is base
        filled(model)
        state = library.get_peft_model_state_dict(model, adapter_name="mine")
        trains = [name for name, p in model.named_parameters() if p.requires_grad]
        found.append((model(X), {key: x.double() for key, x in state.items()}, trains))
    (y, state, trains), (y_here, state_here, trains_here) = found
    agree(y_here, y)
    assert trains == trains_here and state.keys() == state_here.keys()
    agree(state_here, state)


def test_a_state_dict_goes_into_an_injected_model_of_either_library() -> None:
    source = filled(inject_adapter_in_model(LoraConfig(**options()), net()))
    state = lora_ref.get_peft_model_state_dict(source)
    assert set(state) == {f"{i}.lora_{part}.weight" for i in (0, 2) for part in "AB"}
    for library, inject in ((peft, peft.inject_adapter_in_model), (lora_ref, inject_adapter_in_model)):
        model = inject(library.LoraConfig(**options()), net())
        library.set_peft_model_state_dict(model, state)
        agree(model(X).detach(), source(X).detach())


def test_the_modules_of_a_state_dict_are_adapted() -> None:
    state = {f"base_model.model.2.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    for library, inject in ((peft, peft.inject_adapter_in_model), (lora_ref, inject_adapter_in_model)):
        given = {key.removeprefix("base_model.model."): x for key, x in state.items()}
        model = inject(library.LoraConfig(**options(target_modules=["0"])), net(), state_dict=given)
        assert [name for name, m in model.named_modules() if hasattr(m, "lora_A")] == ["2"]
    with pytest.raises(ValueError, match="state_dict holds no factors"):
        inject_adapter_in_model(LoraConfig(**options()), net(), state_dict={"0.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="state_dict has factors of nothing, which the model does not have"):
        inject_adapter_in_model(LoraConfig(**options()), net(), state_dict={"nothing.lora_A.weight": torch.ones(1)})


def test_a_second_adapter_is_in_the_first_ones_place() -> None:
    model = filled(inject_adapter_in_model(LoraConfig(**options()), net(), "first"))
    before = net()(X)  # B of a new adapter is 0
    inject_adapter_in_model(LoraConfig(**options(r=1, target_modules=["3"])), model, "second")
    assert torch.equal(model(X), before)
    assert lora_ref.get_peft_model_state_dict(model, adapter_name="second").keys() == {
        "3.lora_A.weight",
        "3.lora_B.weight",
    }
    assert torch.equal(copy.deepcopy(model)(X), before)


def test_a_model_without_adapters_and_one_with_a_wrapper_are_refused() -> None:
    with pytest.raises(ValueError, match="the Sequential has no adapters: call get_peft_model or inject"):
        lora_ref.get_peft_model_state_dict(net())
    with pytest.raises(ValueError, match="the model is a PeftModel: call its add_adapter"):
        inject_adapter_in_model(LoraConfig(**options()), get_peft_model(net(), LoraConfig(**options())))


def saved(folder: Path, seed: int, **more: Any) -> Path:
    filled(get_peft_model(net(), LoraConfig(**options(**more))), seed).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("more", [{}, {"lora_alpha": 3}, {"use_rslora": True}], ids=str)
def test_swapped_numbers_are_those_of_the_folder_as_in_peft(more: dict[str, Any], tmp_path: Path) -> None:
    first, second = saved(tmp_path / "first", 0), saved(tmp_path / "second", 1, **more)
    want = PeftModel.from_pretrained(net(), second)(X).detach()
    both = [(peft, peft_hotswap)] if "use_rslora" not in more else []  # PEFT wants the same use_rslora
    for library, swap in [*both, (lora_ref, hotswap_adapter)]:
        model = library.PeftModel.from_pretrained(net(), first)
        parameters = list(model.parameters())
        swap(model, str(second), "default", torch_device="cpu")
        agree(model(X).detach(), want)
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    again = tmp_path / "again"
    model.save_pretrained(again)
    agree(PeftModel.from_pretrained(net(), again)(X).detach(), want)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"r": 1}, "r=1 at 0, the adapter has r=2"),
        ({"target_modules": ["0"]}, "only the adapter has 2: delete the adapter, and load the folder instead"),
        ({"target_modules": ["0", "2", "3"]}, "only the folder has 3"),
        ({"modules_to_save": ["3"]}, r"modules_to_save=\['3'\], the adapter has None"),
        ({"bias": "all"}, "bias='all', the adapter has 'none'"),
    ],
    ids=str,
)
def test_a_folder_that_does_not_fit_changes_nothing(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = randomise(get_peft_model(net(), LoraConfig(**options())))
    folder = saved(tmp_path, 1, **more)
    before = Snapshot(model)
    with pytest.raises(ValueError, match=words):
        hotswap_adapter(model, folder, "default")
    assert Snapshot(model) == before
    with pytest.raises(TypeError, match="hotswap_adapter has no argument 'sub_folder'; did you mean 'subfolder'"):
        hotswap_adapter(model, folder, "default", sub_folder="inner")
    with pytest.raises(TypeError, match="load_peft_weights has no argument 'sub_folder'"):
        lora_ref.load_peft_weights(folder, sub_folder="inner")
    assert Snapshot(model) == before
    model.merge_adapter()
    with pytest.raises(ValueError, match="while default is merged"):
        hotswap_adapter(model, saved(tmp_path, 1), "default")


def test_the_newest_injected_adapter_is_active_as_in_peft() -> None:
    found = []
    for library in (peft, lora_ref):
        model = net()
        library.inject_adapter_in_model(library.LoraConfig(**options()), model, "first")
        library.inject_adapter_in_model(library.LoraConfig(**options(target_modules=["3"])), model, "second")
        found.append((library.get_model_status(model).active_adapters, filled(model)(X)))
        model[3].set_adapter("second")  # of one layer, and by one name
        assert model[3].active_adapters == ["second"]
    assert found[0][0] == found[1][0] == ["second"]
    agree(found[1][1], found[0][1])
    assert {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_compiler_wrapped_is_found(inside: bool, tmp_path: Path) -> None:
    source = filled(get_peft_model(net(), LoraConfig(**options())))
    source.save_pretrained(tmp_path)
    if inside:
        model = get_peft_model(torch.compile(net(), backend="eager"), LoraConfig(**options()))
    else:
        model = torch.compile(get_peft_model(net(), LoraConfig(**options())), backend="eager")
    hotswap_adapter(model, tmp_path, "default")
    agree(model(X), source(X))
    state = lora_ref.get_peft_model_state_dict(model)
    assert state.keys() == lora_ref.get_peft_model_state_dict(source).keys()
    lora_ref.set_peft_model_state_dict(model, {key: 0 * x for key, x in state.items()})
    agree(model(X), net()(X))


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("which", ["adapter", "folder"])
def test_a_start_that_is_not_zero_is_not_swapped(start: str, which: str, tmp_path: Path) -> None:
    """The update of such an adapter belongs to another base weight than that of the other."""
    started, plain = options(init_lora_weights=start), options()
    here, saved = (started, plain) if which == "adapter" else (plain, started)
    get_peft_model(net().float(), LoraConfig(**saved)).save_pretrained(tmp_path, convert=False)
    model = get_peft_model(net().float(), LoraConfig(**here))
    before = Snapshot(model)
    with pytest.raises(ValueError, match="delete the adapter, and load the folder"):
        hotswap_adapter(model, tmp_path, "default")
    assert Snapshot(model) == before


@pytest.mark.parametrize("engine", [torch.compile, nn.DataParallel])
def test_a_model_that_an_engine_of_torch_has_wrapped_is_the_model_in_it(engine: Any, tmp_path: Path) -> None:
    model = filled(get_peft_model(net(), LoraConfig(**options())))
    state = lora_ref.get_peft_model_state_dict(model)
    wrapped = engine(model)
    assert lora_ref.get_peft_model_state_dict(wrapped).keys() == state.keys()
    filled(get_peft_model(net(), LoraConfig(**options())), seed=1).save_pretrained(tmp_path)
    hotswap_adapter(wrapped, tmp_path, "default")
    agree(model(X), PeftModel.from_pretrained(net(), tmp_path)(X))
    lora_ref.set_peft_model_state_dict(wrapped, state)
    agree(lora_ref.get_peft_model_state_dict(model), state)


def test_a_compiled_model_is_injected_from_a_state_dict_as_in_peft() -> None:
    found = []
    for library, inject in ((peft, peft.inject_adapter_in_model), (lora_ref, inject_adapter_in_model)):
        state = library.get_peft_model_state_dict(inject(library.LoraConfig(**options()), net()))
        model = inject(library.LoraConfig(**options(target_modules=["3"])), torch.compile(net()), state_dict=state)
        found.append({key.replace("_orig_mod.", "") for key in library.get_peft_model_state_dict(model)})
    assert found[0] == found[1] == state.keys()


def test_the_state_dict_of_a_model_in_fsdp_is_pefts() -> None:
    from torch import distributed
    from torch.distributed.fsdp import FullyShardedDataParallel

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for library in (peft, lora_ref):
            model = filled(library.get_peft_model(net(), library.LoraConfig(**options(modules_to_save=["3"]))))
            wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
            found.append(library.get_peft_model_state_dict(wrapped))
        assert found[0].keys() == found[1].keys()
        agree(found[1], found[0])
    finally:
        distributed.destroy_process_group()


def numbers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: x.clone() for key, x in state.items()}


def test_the_state_dict_of_the_base_model_is_the_original() -> None:
    base = net()
    before = numbers(base.state_dict())
    model = filled(get_peft_model(base, LoraConfig(**options(modules_to_save=["3"]))))
    model.add_adapter("other", LoraConfig(r=1, target_modules=["2"]))
    theirs = peft.get_peft_model(net(), peft.LoraConfig(**options(modules_to_save=["3"])))
    assert lora_ref.get_base_model_state_dict(model).keys() == peft.get_base_model_state_dict(theirs).keys()
    agree(lora_ref.get_base_model_state_dict(model), before)
    model.merge_adapter()
    agree(lora_ref.get_base_model_state_dict(model), before)
    with pytest.raises(ValueError, match="default is merged"):
        lora_ref.set_base_model_state_dict(model, before)
    model.unmerge_adapter()
    for library, adapted in ((peft, theirs), (lora_ref, model)):
        other = {key: x + 1 for key, x in before.items()}
        assert not any(library.set_base_model_state_dict(adapted, other))
        agree(library.get_base_model_state_dict(adapted), other)
        wrong = {"none": torch.ones(1)} | {key: x for key, x in before.items() if key != "0.bias"}
        assert tuple(library.set_base_model_state_dict(adapted, wrong, strict=False)) == (["0.bias"], ["none"])
        with pytest.raises(RuntimeError, match="Missing key"):
            library.set_base_model_state_dict(adapted, wrong)
    with pytest.raises(RuntimeError, match=r"0.bias: has shape \(1,\), the model needs \(5,\)"):
        lora_ref.set_base_model_state_dict(model, before | {"0.bias": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"0.bias: has shape \(9,\), the model needs \(5,\)"):
        lora_ref.set_base_model_state_dict(model, before | {"0.bias": torch.ones(9)})


@pytest.mark.parametrize("init", [True, "gaussian", "eva", "mica", "pissa"])
def test_low_cpu_mem_usage_leaves_the_numbers_to_the_state_dict(init: Any) -> None:
    config = options(init_lora_weights=init)
    source = filled(get_peft_model(net(), LoraConfig(**config)))
    state = lora_ref.get_peft_model_state_dict(source)
    made = [
        lora_ref.get_peft_model(net(), LoraConfig(**config), low_cpu_mem_usage=True),
        inject_adapter_in_model(LoraConfig(**config), net(), low_cpu_mem_usage=True),
    ]
    for model in made:
        devices = {p.device.type for name, p in model.named_parameters() if "lora_" in name}
        assert devices == ({"cpu"} if init == "pissa" else {"meta"})  # PiSSA's initial update needs its numbers
        lora_ref.set_peft_model_state_dict(model, state)
        agree(model(X), source(X))
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in source.parameters()]
