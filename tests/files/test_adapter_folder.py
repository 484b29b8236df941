"""Writing and reading adapter folders: complete or not at all, exact, and independent of the file afterwards."""

import errno
import json
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import Conv1D, Experts
from torch import Tensor, nn

from lora_ref import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from lora_ref.files import adapter_folder as storage
from lora_ref.files import config_file

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


class Net(nn.Module):
    """One layer of every type that can be adapted, and a head with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.t = nn.Embedding(11, 8), nn.Linear(8, 8), Conv1D(8, 8)
        self.c1, self.c2, self.c3 = nn.Conv1d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv3d(8, 8, 1, bias=False)
        self.grouped, self.experts = nn.Conv1d(8, 8, 1, groups=2), Experts(3, 8, 8)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.t(self.lin(self.emb(ids)))  # (batch, tokens, 8)
        x = self.grouped(self.c1(x.mT))
        x = self.c3(self.c2(x[..., None])[..., None]).flatten(2).mT
        return self.head(self.experts(x).mean(1))


ALL: dict[str, Any] = {
    "r": 2,
    "target_modules": ["emb", "lin", "t", "c1", "c2", "c3", "grouped"],
    "target_parameters": ["experts.stack"],
    "modules_to_save": ["head"],
    "init_lora_weights": False,
}
IDS = torch.arange(10).reshape(2, 5)


def base(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def adapt(**options: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base(), LoraConfig(**ALL | options))


def load(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder, **options)


def small(value: float = 1.0) -> PeftModel:
    """A small adapter full of one value, which its lora_alpha has, too (NaN cannot be one)."""
    config = LoraConfig(r=2, lora_alpha=1.0 if math.isnan(value) else value, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("rslora", [False, True])
def test_every_layer_type_bias_mode_and_saved_module_comes_back_exactly(
    tmp_path: Path, bias: str, rslora: bool
) -> None:
    model = adapt(bias=bias, use_rslora=rslora, rank_pattern={"lin": 4}, alpha_pattern={"c1": 3.0})
    with torch.no_grad():  # as if trained
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.train()
    model(IDS)  # moves BatchNorm's running mean, a buffer inside a saved module
    model.eval()
    model.save_pretrained(tmp_path)
    again = load(base(), tmp_path).eval()
    assert torch.equal(again(IDS), model(IDS))
    a, b = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert a.keys() == b.keys() == safetensors.torch.load_file(tmp_path / WEIGHTS).keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)
    assert "base_model.model.head.1.running_mean" in a and a["base_model.model.head.1.running_mean"].any()
    assert "base_model.model.head.1.num_batches_tracked" in a
    assert ("base_model.model.lin.base_layer.bias" in a) is (bias != "none")
    assert not any(parameter.requires_grad for parameter in again.parameters())
    trains = [n for n, p in load(base(), tmp_path, is_trainable=True).named_parameters() if p.requires_grad]
    assert trains == [n for n, p in model.named_parameters() if p.requires_grad]


def test_the_files_are_pefts(tmp_path: Path) -> None:
    adapt().save_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == [CARD, CONFIG, WEIGHTS]
    with safetensors.safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        shapes = {key.removeprefix("base_model.model."): tuple(file.get_tensor(key).shape) for key in list(file.keys())}
    assert shapes["lin.lora_A.weight"] == shapes["t.lora_A.weight"] == (2, 8)
    assert shapes["emb.lora_embedding_A"] == (2, 11) and shapes["emb.lora_embedding_B"] == (8, 2)
    assert shapes["c1.lora_A.weight"] == (2, 8, 3) and shapes["c1.lora_B.weight"] == (8, 2, 1)
    assert shapes["experts.lora_A.weight"] == (6, 8) and shapes["experts.lora_B.weight"] == (8, 6)
    data = json.loads((tmp_path / CONFIG).read_text())
    assert data["inference_mode"] is True and data["peft_type"] == "LORA" and list(data) == sorted(data)


def test_several_adapters_go_to_folders_of_their_names(tmp_path: Path) -> None:
    model = small()
    model.add_adapter("other one", LoraConfig(r=3, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == sorted(
        f"{folder}{file}" for folder in ("", "other one/") for file in (CARD, CONFIG, WEIGHTS)
    )
    again = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    again.load_adapter(tmp_path / "other one", "other one")
    for name in ("default", "other one"):
        a, b = get_peft_model_state_dict(model, adapter_name=name), get_peft_model_state_dict(again, adapter_name=name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    model.save_pretrained(tmp_path / "one", selected_adapters=["other one"])
    assert sorted(contents(tmp_path / "one")) == [f"other one/{file}" for file in (CARD, CONFIG, WEIGHTS)]
    with pytest.raises(ValueError, match="there is no adapter 'othr'"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["othr"])
    assert not (tmp_path / "none").exists()


def test_saving_while_merged_or_disabled_writes_the_same_bytes(tmp_path: Path) -> None:
    model = adapt(target_modules=["lin", "t", "emb"], bias="all")
    model.save_pretrained(tmp_path / "plain")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            model.save_pretrained(tmp_path / "off")
    assert contents(tmp_path / "plain") == contents(tmp_path / "merged") == contents(tmp_path / "off")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_file_of_another_precision_loads_into_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    small().save_pretrained(tmp_path)
    tensors = {key: t.uniform_(-1, 1).to(dtype) for key, t in safetensors.torch.load_file(tmp_path / WEIGHTS).items()}
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    for key, tensor in get_peft_model_state_dict(model).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, tensors[key].float())


def test_float64_numbers_beyond_float32_belong_to_a_float64_base(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    tensors = {k: t.double() * 1e300 for k, t in safetensors.torch.load_file(tmp_path / WEIGHTS).items()}
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS)
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3).double()), tmp_path)
    assert all(torch.equal(t, tensors[key]) for key, t in get_peft_model_state_dict(model).items())
    with pytest.raises(ValueError, match=r"out of range for torch\.float32"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)


def test_nan_is_saved_with_a_warning_that_it_cannot_be_read(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"holds NaN or infinite numbers \(base_model\.model\.0\.lora_A\.weight"):
        small(float("nan")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds NaN or infinite numbers"):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)


def test_loaded_tensors_do_not_live_in_the_file(tmp_path: Path) -> None:
    small(2.0).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), tmp_path)
    want = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    _, tensors = storage.read_adapter(tmp_path)
    size = (tmp_path / WEIGHTS).stat().st_size
    with open(tmp_path / WEIGHTS, "r+b") as file:  # in place: the same inode
        file.write(b"\xab" * size)
    (tmp_path / WEIGHTS).unlink()
    for loaded in (tensors, get_peft_model_state_dict(model)):
        assert loaded.keys() == want.keys() and all(torch.equal(loaded[key], want[key]) for key in want)


def test_a_base_without_numbers_gets_those_of_the_adapter(tmp_path: Path) -> None:
    small(2.0).save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(4, 3))
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(empty, tmp_path))
    assert all(not t.is_meta and torch.equal(t, torch.full_like(t, 2.0)) for t in loaded.values())
    assert empty[0].base_layer.weight.is_meta


# -- where to --------------------------------------------------------------------------------------


def test_missing_parents_are_made_and_an_adapter_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b" / "c"
    small(1.0).save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    small(3.0).save_pretrained(str(folder))
    model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 3)), folder)
    assert all((tensor == 3).all() for tensor in get_peft_model_state_dict(model).values())
    assert sorted(contents(folder)) == ["README.md", CONFIG, WEIGHTS]


def test_a_file_in_the_place_of_the_folder_or_of_a_parent_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError):
            small().save_pretrained(path)
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_place_that_cannot_be_written_is_an_os_error() -> None:
    with pytest.raises(OSError):  # a file system that nobody can write to, not even root
        small().save_pretrained("/proc/lora_ref")


def test_pickles_are_not_written_and_odd_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pickle"):
        small().save_pretrained(tmp_path / "x", safe_serialization=False)
    with pytest.raises(ValueError, match="save_embedding_layers='yes': must be True, False or 'auto'"):
        small().save_pretrained(tmp_path / "x", save_embedding_layers="yes")
    small().save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


# -- all or nothing --------------------------------------------------------------------------------


def after(calls: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """The function, which fails instead of its call number `calls` (from 0)."""
    left = [calls]

    def faulty(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise error
        return function(*args, **kwargs)

    return faulty


FULL = OSError(errno.ENOSPC, "No space left on device")
FAULTS = {
    "tensors": (safetensors.torch, "save_file", 0),
    "config-text": (config_file, "dumps", 0),
    "config-write": (Path, "write_text", 0),
    "fsync-tensors": (os, "fsync", 0),
    "fsync-config": (os, "fsync", 1),
    "replace-first": (os, "replace", 0),
}


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), MemoryError()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_save_that_fails_leaves_the_old_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, error: BaseException
) -> None:
    small(1.0).save_pretrained(tmp_path)
    old = contents(tmp_path)
    owner, name, calls = FAULTS[fault]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, after(calls, getattr(owner, name), error))
        with pytest.raises(type(error)):
            small(2.0).save_pretrained(tmp_path)
    assert contents(tmp_path) == old
    small(2.0).save_pretrained(tmp_path)
    assert contents(tmp_path).keys() == old.keys()


@pytest.mark.parametrize("fault", ["replace-second", "fsync-folder"])
def test_a_save_that_fails_late_leaves_the_new_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    small(1.0).save_pretrained(tmp_path)
    name, calls = {"replace-second": ("replace", 1), "fsync-folder": ("fsync", 3)}[fault]
    with monkeypatch.context() as patch:
        patch.setattr(os, name, after(calls, getattr(os, name), FULL))
        with pytest.raises(OSError, match="No space left"):
            small(2.0).save_pretrained(tmp_path)
    config, tensors = storage.read_adapter(tmp_path)
    assert config.lora_alpha == 2 and all((t == 2).all() for t in tensors.values())
    small(3.0).save_pretrained(tmp_path)
    assert sorted(contents(tmp_path)) == [CARD, CONFIG, WEIGHTS]


def test_an_error_of_safetensors_while_writing_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = safetensors.SafetensorError("I/O error: No space left on device")
    monkeypatch.setattr(safetensors.torch, "save_file", after(0, safetensors.torch.save_file, error))
    with pytest.raises(OSError, match="could not be written: I/O error"):
        small().save_pretrained(tmp_path)
    assert contents(tmp_path) == {}


# -- state dicts -----------------------------------------------------------------------------------


def test_a_state_dict_goes_in_and_out(tmp_path: Path) -> None:
    model, other = small(1.0), small(2.0)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert all((tensor == 2).all() for tensor in get_peft_model_state_dict(model).values())
    with torch.no_grad():  # copies: what happens to one does not happen to the other
        other.base_model.model[0].lora_A["default"].weight.fill_(7)
    assert all((tensor == 2).all() for tensor in get_peft_model_state_dict(model).values())


A, B = (f"base_model.model.0.lora_{x}.weight" for x in "AB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {A: t[A]}, f"{B}: is missing"),
        (lambda t: {}, f"{A}: is missing; {B}: is missing"),
        (lambda t: t | {"x": t[A]}, "x: is not expected"),
        (lambda t: t | {A: t[A][:1]}, rf"{A}: has shape \(1, 4\), the model needs \(2, 4\)"),
        (lambda t: t | {A: t[A].T}, rf"{A}: has shape \(4, 2\)"),
        (lambda t: t | {A: t[A].int()}, f"{A}: is torch.int32, the model needs torch.float32"),
        (lambda t: t | {A: t[A].bool()}, f"{A}: is torch.bool"),
        (lambda t: t | {A: t[A] + 1j}, f"{A}: is torch.complex64"),
        (lambda t: t | {B: t[B] * float("nan")}, f"{B}: is out of range"),
        (lambda t: t | {B: t[B] / 0}, f"{B}: is out of range"),
        (lambda t: t | {B: t[B].double() * 1e300}, f"{B}: is out of range for torch.float32"),
        (
            lambda t: {k.replace("lora_A", "lora_A.default"): v for k, v in t.items()},
            f"{A}: is missing; .*not expected",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(change: Callable[[Any], Any], message: str) -> None:
    model = small(1.0)
    tensors = change(dict(get_peft_model_state_dict(small(2.0))))
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, tensors)
    assert all((tensor == 1).all() for tensor in get_peft_model_state_dict(model).values())


def test_an_unknown_adapter_is_named() -> None:
    for function in (
        lambda m, name: get_peft_model_state_dict(m, adapter_name=name),
        lambda m, name: set_peft_model_state_dict(m, {}, name),
    ):
        with pytest.raises(ValueError, match=r"there is no adapter 'defualt'.*did you mean 'default'"):
            function(small(), "defualt")


def test_a_module_saved_whole_may_hold_one_module_twice(tmp_path: Path) -> None:
    """Its tensors have a key for each place, as in a state dict."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        twice = nn.Linear(4, 4)
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(twice, nn.ReLU(), twice))

    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False))
    with torch.no_grad():
        model.base_model.model[1].modules_to_save["default"][0].weight.add_(1)
    model.save_pretrained(tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert {f"base_model.model.1.{i}.weight" for i in (0, 2)} <= keys
    again, x = load(net(), tmp_path), torch.ones(1, 4)
    assert torch.equal(again(x), model(x))


def test_a_file_that_is_longer_than_its_tensors_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is: a sparse one may claim any size."""
    small().save_pretrained(tmp_path)
    with open(tmp_path / "adapter_model.safetensors", "ab") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(safetensors.torch, "load", lambda data: pytest.fail("read"))
    with pytest.raises(ValueError, match=r"not a valid safetensors file: .*(fully covered|IncompleteBuffer)"):
        load(nn.Sequential(nn.Linear(4, 3)), tmp_path)


def test_a_module_that_is_held_twice_hides_none_of_those_after_it(tmp_path: Path) -> None:
    shared = nn.Tanh()
    net = nn.Sequential(shared, shared, nn.Linear(4, 3))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["2"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again, x = load(nn.Sequential(shared, shared, net[2].base_layer), tmp_path), torch.ones(1, 4)
    assert torch.equal(again(x), model(x))


def test_a_tensor_that_is_not_expected_is_refused_where_biases_are_saved_too(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    get_peft_model(two_layers(), LoraConfig(r=2, target_modules=["0"], bias="all")).save_pretrained(tmp_path)
    safetensors.torch.save_file({**safetensors.torch.load_file(path), "base_model.model.9.bias": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"9\.bias: is not expected"):
        PeftModel.from_pretrained(two_layers(), tmp_path)


def test_a_rank_beyond_any_memory_is_refused_before_anything_is_made() -> None:
    with pytest.raises(ValueError, match=r"r=35184372088832 is beyond any memory"):
        storage.allocate_nothing(torch.zeros(16, 3), r=2**45, scaling=1.0)


class Blocks(nn.Module):
    """Two layers, in a list at the root of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(3, 3), "v": nn.Linear(3, 3)}) for _ in range(2))


@pytest.mark.parametrize("indices", [[0], 99, -1])
def test_a_folder_adapts_the_modules_that_it_has_whatever_layers_to_transform_says(
    indices: Any, tmp_path: Path
) -> None:
    """N7: PEFT adapts a module whose name is written out in full, and its files hold it."""
    net = Blocks()
    names = ["layers.0.q", "layers.1.v"]
    model = get_peft_model(net, LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    found = json.loads((tmp_path / CONFIG).read_text()) | {"layers_to_transform": indices}
    (tmp_path / CONFIG).write_text(json.dumps(found))
    again = PeftModel.from_pretrained(Blocks(), tmp_path)
    assert list(again.lora_layers()) == names
    again.save_pretrained(tmp_path / "again")
    assert list(PeftModel.from_pretrained(Blocks(), tmp_path / "again").lora_layers()) == names
    assert get_peft_model_state_dict(again).keys() == get_peft_model_state_dict(model).keys()
    config = json.loads((tmp_path / "again" / CONFIG).read_text())
    assert config["layers_to_transform"] is None and sorted(config["target_modules"]) == names
