"""PeftModel's operations, statement by statement: U1-U9 (multi-adapter), B1-B7 (biases), Z2 (modules_to_save)."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Conv1D, Experts
from torch import Tensor, nn
from torch.nn.utils import prune

from lora_ref import LoraConfig, LoraModel, PeftModel, get_peft_model
from lora_ref.core import model as core
from lora_ref.core.adapter_modules import AdapterModule, ModulesToSave
from spec_tests import agree


class Net(nn.Module):
    """emb -> fc1 -> norm -> fc2 -> conv -> head, every bias there is."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 8)
        self.fc1, self.norm, self.fc2 = nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 8)
        self.conv, self.head = nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.fc2(torch.tanh(self.norm(self.fc1(self.emb(tokens)))))
        return self.head(self.conv(h.mT).mT)


TOKENS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0], [1, 1, 1, 1]])
BIASES = ["fc1.bias", "norm.bias", "fc2.bias", "conv.bias", "head.bias"]


def config(*targets: str, **options: Any) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 3, "init_lora_weights": False} | options
    return LoraConfig(target_modules=list(targets or ("fc1", "fc2")), **options)


def plain_net() -> Net:
    """What `adapted` starts from."""
    torch.manual_seed(0)
    return Net().double().eval().requires_grad_(False)


def adapted(*targets: str, **options: Any) -> tuple[PeftModel, Net]:
    torch.manual_seed(0)
    net = Net().double().eval()
    return get_peft_model(net, config(*targets, **options)), net


def train(model: PeftModel, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        model(TOKENS).tanh().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_biases(model: PeftModel) -> list[str]:
    """The names of the base biases that require a gradient, wrappers' names taken out."""
    names = [n for n, p in model.get_base_model().named_parameters() if p.requires_grad and n.endswith(".bias")]
    return [n.replace(".base_layer", "").replace(".original_module", "") for n in names]


def bytes_of(module: nn.Module) -> dict[str, tuple[int, bytes]]:
    return {n: (id(p), p.detach().numpy().tobytes()) for n, p in module.named_parameters()}


# -- bias modes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, want",
    [("none", []), ("all", BIASES), ("lora_only", ["fc1.bias", "fc2.bias"])],
    ids=["none", "all", "lora_only"],
)
def test_which_biases_train(mode: str, want: list[str]) -> None:
    """B1, B2, B3; and B4: before any step the output is the base's."""
    plain = plain_net()
    model, net = adapted(bias=mode, init_lora_weights=True)
    assert trained_biases(model) == want
    assert torch.equal(model(TOKENS), plain(TOKENS))
    before = {n: dict(plain.named_parameters())[n].clone() for n in BIASES}
    with torch.no_grad():
        for layer in model.lora_layers().values():
            layer.lora_B["default"].weight.normal_()
    train(model)
    net = model.unload()
    for n in BIASES:
        assert torch.equal(net.get_parameter(n), before[n]) is (n not in want)
    # B4: unload does not restore them
    assert torch.equal(net(TOKENS), plain(TOKENS)) is (mode == "none")


def test_trained_biases_stay_in_the_base() -> None:
    """B4, B5: through disabling (with a warning), switching, merging and deleting."""
    model, net = adapted(bias="all")
    model.add_adapter("b", config())
    train(model)
    with_biases = copy.deepcopy(net)
    y = model(TOKENS)
    model.merge_adapter()
    agree(model(TOKENS), y)
    with (
        pytest.warns(UserWarning, match="adapter 'default' trains biases of the base model in place"),
        model.disable_adapter(),
    ):
        off = model(TOKENS)
    model.unmerge_adapter()
    copied = PeftModel.get_base_model(model)
    model.set_adapter("b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the active adapter trains none
        with model.disable_adapter():
            assert torch.equal(model(TOKENS), off)
    model.delete_adapter("default")
    with model.disable_adapter():
        assert torch.equal(model(TOKENS), off)
    assert copied is net and all(
        torch.equal(p, q) for (_, p), (_, q) in zip(
            [x for x in net.named_parameters() if x[0].endswith("bias")],
            [x for x in with_biases.named_parameters() if x[0].endswith("bias")], strict=True,
        )
    )  # fmt: skip


def test_biases_train_with_the_active_adapter() -> None:
    """B6: after switching away they are frozen, after switching back exactly they train; deleting ends it."""
    model, _ = adapted("fc1", bias="lora_only")
    model.add_adapter("b", config("fc2"))
    assert trained_biases(model) == ["fc1.bias"]
    for names, want in [("b", []), ("default", ["fc1.bias"]), (["b", "default"], ["fc1.bias"]), ([], [])]:
        model.set_adapter(names)
        assert trained_biases(model) == want
    model.set_adapter("default", inference_mode=True)
    assert trained_biases(model) == []
    model.set_adapter("default")
    model.delete_adapter("default")
    assert trained_biases(model) == [] and model.active_adapters == ["b"]
    model.add_adapter("c", config("fc1", bias="all"))  # the one there was is gone
    model.set_adapter("c")
    assert trained_biases(model) == BIASES


@pytest.mark.parametrize("first, other", [("all", "all"), ("all", "lora_only"), ("lora_only", "all")])
def test_a_second_adapter_with_biases_is_refused(first: str, other: str) -> None:
    model, _ = adapted(bias=first)
    names = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=rf"^bias='{other}': adapter 'default' already trains biases"):
        model.add_adapter("b", config(bias=other))
    assert [n for n, _ in model.named_parameters()] == names and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("value", ["al", "", None, True, "ALL"])
def test_an_unknown_bias_mode(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^bias=.*must be 'none', 'all' or 'lora_only'"):
        LoraConfig(bias=value)


def test_all_biases_include_those_of_a_module_that_another_adapter_saves() -> None:
    """The order in which adapters are added changes neither what trains nor the names in the file."""
    model, _ = adapted("fc1", bias="all")
    model.add_adapter("b", config("fc2", modules_to_save=["head"]))
    model.set_adapter("b")
    assert trained_biases(model) == ["head.modules_to_save.b.bias"]
    model.set_adapter("default")
    assert trained_biases(model) == BIASES


@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_a_file_does_not_depend_on_the_other_adapters(mode: str, tmp_path: Any) -> None:
    """An adapter's biases in layers that only another one wraps are saved under their plain names."""
    model, _ = adapted("fc1", bias=mode)
    model.add_adapter("b", config("fc2", modules_to_save=["head"]))
    train(model)
    y = model(TOKENS)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    torch.manual_seed(0)
    assert torch.equal(PeftModel.from_pretrained(Net().double().eval(), tmp_path)(TOKENS), y)


def test_disabling_restores_what_trains() -> None:
    """U2: switching, deleting and adding inside the block is undone or takes no effect on what trains."""
    model, _ = adapted(bias="all")
    model.add_adapter("b", config())
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            model.set_adapter("b")
            model.add_adapter("c", config("fc1"))
            model.set_adapter("c")
    assert model.active_adapters == ["default"]
    now = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: now[n] for n in before} == before and not any(now[n] for n in now if n not in before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            model.delete_adapter("default")
    assert model.active_adapters == [] and not any(p.requires_grad for p in model.parameters())


# -- modules_to_save -------------------------------------------------------------------------------


def test_modules_to_save() -> None:
    """Z2: a copy for each adapter, the original kept; the copy of the active one answers."""
    model, net = adapted("fc1", modules_to_save=["head"])
    original = net.head.original_module
    plain = bytes_of(original)
    model.add_adapter("b", config("fc1", modules_to_save=["head"]))
    assert isinstance(net.head, ModulesToSave) and net.head.modules_to_save["default"] is not original
    base = model.base_model.model
    with model.disable_adapter():
        off = model(TOKENS)
    train(model)
    y = model(TOKENS)
    assert bytes_of(original) == plain
    assert not torch.equal(net.head.modules_to_save["default"].weight, original.weight)
    assert torch.equal(net.head.modules_to_save["b"].weight, original.weight)
    model.set_adapter("b")
    assert not any(p.requires_grad for p in net.head.modules_to_save["default"].parameters())
    assert all(p.requires_grad for p in net.head.modules_to_save["b"].parameters())
    model.set_adapter("default")
    assert torch.equal(model(TOKENS), y)
    with model.disable_adapter():
        assert torch.equal(model(TOKENS), off)
    with pytest.raises(ValueError, match=r"adapters \['default', 'b'\] each save a module"):
        model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default"] and torch.equal(model(TOKENS), y)
    copied = copy.deepcopy(model)
    assert model.unload() is base and net.head is original and torch.equal(net(TOKENS), off)
    merged = copied.merge_and_unload()
    assert type(merged.head) is nn.Linear
    agree(merged(TOKENS), y)


def test_modules_to_save_of_one_adapter_do_not_answer_for_another() -> None:
    model, net = adapted("fc1", modules_to_save=["head"])
    model.add_adapter("b", config("fc2"))
    train(model)
    model.set_adapter("b")
    assert net.head.delegate is net.head.original_module
    model.set_adapter(["b", "default"])
    assert net.head.delegate is net.head.modules_to_save["default"]


def test_a_head_is_saved_and_not_adapted() -> None:
    model, net = adapted("fc1", "head", modules_to_save=["head"])
    assert list(model.lora_layers()) == ["fc1"] and isinstance(net.head, ModulesToSave)
    model, net = adapted("fc1", task_type="SEQ_CLS", modules_to_save=["head"])
    assert model.peft_config["default"].modules_to_save == ["head", "classifier", "score"] and isinstance(
        net.head, ModulesToSave
    )


def test_a_module_cannot_be_adapted_by_one_and_saved_whole_by_another() -> None:
    model, _ = adapted("fc1", "head")
    with pytest.raises(ValueError, match=r"^head: modules_to_save covers layers that another adapter adapts"):
        model.add_adapter("b", config("fc1", modules_to_save=["head"]))
    model, _ = adapted("fc1", modules_to_save=["head"])
    with pytest.raises(ValueError, match=r"^head: another adapter saves this module whole"):
        model.add_adapter("b", config("fc1", "head"))


# -- adding, switching, merging ----------------------------------------------------------------------


def test_a_new_adapter_is_inactive_and_frozen() -> None:
    """U7."""
    model, _ = adapted()
    y, names = model(TOKENS), [n for n, p in model.named_parameters() if p.requires_grad]
    model.add_adapter("b", config("emb", "fc1"))
    assert torch.equal(model(TOKENS), y)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names
    assert model.active_adapter == "default"
    model.set_adapter("b")
    assert model.active_adapter == "b" and not torch.equal(model(TOKENS), y)
    assert {
        n.split(".")[-2 if n.endswith("weight") else -1] for n, p in model.named_parameters() if p.requires_grad
    } == {"b"}
    model.set_adapter(("default", "b"))
    assert model.active_adapter == ["default", "b"]


def test_several_active_adapters_add() -> None:
    """U7: on one linear layer, where deltas are visible in the output."""
    torch.manual_seed(0)
    base = nn.Linear(4, 3).double()
    model = get_peft_model(nn.Sequential(base), config("0"))
    model.add_adapter("b", config("0", r=3, use_rslora=True))
    x = torch.randn(2, 4).double()
    d = {}
    for name in ("default", "b"):
        model.set_adapter(name)
        d[name] = model(x) - base(x)
    model.set_adapter(["default", "b"])
    agree(model(x), base(x) + d["default"] + d["b"])
    model.set_adapter([])
    assert torch.equal(model(x), base(x))


def test_merging() -> None:
    """U1: active ones by default, once each; what is active and not merged still counts, and so does what is merged."""
    model, net = adapted()
    model.add_adapter("b", config("fc1", "emb"))
    model.set_adapter(["default", "b"])
    both = model(TOKENS)
    model.merge_adapter(["b"])
    agree(model(TOKENS), both)  # one merged, one added
    W = net.fc1.base_layer.weight
    model.merge_adapter(["b"])
    assert net.fc1.base_layer.weight is W
    model.merge_adapter()
    model.merge_adapter()
    agree(model(TOKENS), both)
    assert model.lora_layers()["fc1"].merged_adapters == ["b", "default"]
    model.unmerge_adapter()
    model.set_adapter("default")
    model.merge_adapter(["b"])  # merged and not active: it is in the weights, so it counts
    agree(model(TOKENS), both)
    model.set_adapter("default")  # U3: unmerges first
    assert not any(layer.merged for layer in model.lora_layers().values())
    model.merge_adapter()
    for forbidden in (
        lambda: model.delete_adapter("default"),
        lambda: model.set_scale("default", 2),
        lambda: model(TOKENS, adapter_names=["default"] * 3),
    ):
        with pytest.raises(ValueError, match="not possible while default is merged: call unmerge_adapter first"):
            forbidden()
    model.delete_adapter("b")
    assert model.lora_layers()["fc1"].merged_adapters == ["default"]


def test_merging_a_grouped_convolution_merges_nothing_at_all() -> None:
    """U4."""
    model, _ = adapted("fc1", "conv", "head")
    with pytest.raises(ValueError, match=r"^conv: .*groups=2"):
        model.merge_adapter()
    with pytest.raises(ValueError, match=r"^conv: .*groups=2"):
        model.merge_and_unload()
    assert not any(layer.merged for layer in model.lora_layers().values()) and len(model.lora_layers()) == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("merged", [False, True])
def test_disabling_ends_with_the_block(merged: bool, error: type[BaseException]) -> None:
    """U2, by an exception too, and nested."""
    plain = plain_net()
    model, _ = adapted()
    if merged:
        model.merge_adapter()
    y = model(TOKENS)
    with pytest.raises(error), model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(model(TOKENS), plain(TOKENS))
        assert torch.equal(model(TOKENS), plain(TOKENS))
        raise error
    assert torch.equal(model(TOKENS), y) and model.lora_layers()["fc1"].merged is merged


def test_renaming_a_merged_adapter_while_disabled_keeps_the_base() -> None:
    """The weight put aside must not be taken for the base's."""
    model, net = adapted()
    W, y = net.fc1.base_layer.weight.detach().clone(), model(TOKENS)
    model.merge_adapter()
    with model.disable_adapter():
        model.rename_adapter("default", "b")
    assert model.active_adapters == ["b"] and model.lora_layers()["fc1"].merged_adapters == ["b"]
    agree(model(TOKENS), y)
    model.unmerge_adapter()
    assert torch.equal(net.fc1.base_layer.weight, W) and torch.equal(model(TOKENS), y)


def test_renaming_a_merged_adapter() -> None:
    model, net = adapted()
    y, W = model(TOKENS), net.fc1.base_layer.weight.detach().clone()
    model.merge_adapter()
    model.rename_adapter("default", "b")
    assert model.lora_layers()["fc1"].merged_adapters == ["b"]
    agree(model(TOKENS), y)
    with pytest.raises(ValueError, match="deleting is not possible while b is merged"):
        model.delete_adapter("b")
    model.unmerge_adapter()
    assert torch.equal(net.fc1.base_layer.weight, W)


def test_what_is_added_while_disabled_is_disabled() -> None:
    plain = plain_net()
    model, _ = adapted("fc1")
    y = model(TOKENS)
    with model.disable_adapter():
        model.add_adapter("b", config("fc2"))
        model.set_adapter("b")
        assert torch.equal(model(TOKENS), plain(TOKENS))
    assert torch.equal(model(TOKENS), y)
    model.disable_adapter_layers()
    model.add_adapter("c", config("head"))
    model.set_adapter("c")
    assert torch.equal(model(TOKENS), plain(TOKENS))
    model.enable_adapter_layers()
    assert not torch.equal(model(TOKENS), plain(TOKENS))


@pytest.mark.parametrize("state", ["plain", "merged", "disabled", "trained"])
def test_unload_gives_the_original_back(state: str) -> None:
    """U5, U6: the same object, the same parameters, the same bits, the same names."""
    torch.manual_seed(0)
    net = Net().double()
    before, modules, text = bytes_of(net), dict(net.named_modules()), repr(net)
    model = get_peft_model(net, config("emb", "fc1", "conv", modules_to_save=["head"]))
    if state == "trained":
        train(model)
    if state == "merged":
        model.set_adapter("default")
        model.delete_adapter("default")
        model.add_adapter("default", config("emb", "fc1", modules_to_save=["head"]))
        model.set_adapter("default")
        model.merge_adapter()
    if state == "disabled":
        model.disable_adapter_layers()
    assert model.unload() is net
    assert bytes_of(net) == before and dict(net.named_modules()) == modules and repr(net) == text
    assert get_peft_model(net, config("fc1")).unload() is net  # and again


@pytest.mark.parametrize("state", ["plain", "merged", "disabled"])
def test_merge_and_unload_gives_a_plain_model(state: str) -> None:
    """U5."""
    model, net = adapted("emb", "fc1", "fc2", modules_to_save=["head"])
    train(model)
    names, y = [n for n, _ in Net().named_parameters()], model(TOKENS)
    if state == "merged":
        model.merge_adapter()
    if state == "disabled":
        model.disable_adapter_layers()
    assert model.merge_and_unload() is net and [n for n, _ in net.named_parameters()] == names
    assert not any(isinstance(m, AdapterModule) for m in net.modules())
    agree(net(TOKENS), y)


def test_merge_and_unload_of_named_adapters() -> None:
    model, _ = adapted()
    model.add_adapter("b", config("emb"))
    model.set_adapter("b")
    y = model(TOKENS)
    model.set_adapter("default")
    agree(model.merge_and_unload(adapter_names=["b"])(TOKENS), y)


def test_deleting() -> None:
    """The first that is left becomes active; with none left, the model is the base model."""
    plain = plain_net()
    model, _ = adapted()
    model.add_adapter("b", config("fc1"))
    model.add_adapter("c", config("emb"))
    model.set_adapter(["default", "c"])
    model.delete_adapter("default")
    assert model.active_adapters == ["c"] and list(model.peft_config) == ["b", "c"]
    model.delete_adapter("c")
    assert model.active_adapters == ["b"]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"base_model.model.fc1.lora_{x}.b.weight" for x in "AB"
    ]
    model.delete_adapter("b")
    assert model.active_adapters == [] and torch.equal(model(TOKENS), plain(TOKENS))
    assert not any("lora" in n for n, _ in model.named_parameters())
    with pytest.raises(ValueError, match=r"there is no adapter 'b'; there are \[\]"):
        model.delete_adapter("b")


def test_renaming_keeps_everything() -> None:
    model, _ = adapted("emb", "fc1", "conv", modules_to_save=["head"], bias="all")
    model.add_adapter("other", config("fc2"))
    y, trained = model(TOKENS), [id(p) for p in model.parameters() if p.requires_grad]
    model.rename_adapter("default", "new")
    assert list(model.peft_config) == ["new", "other"] and model.active_adapters == ["new"]
    assert torch.equal(model(TOKENS), y) and [id(p) for p in model.parameters() if p.requires_grad] == trained
    assert not any("default" in n for n, _ in model.named_parameters())
    for new, message in [
        ("other", "there is an adapter 'other' already"),
        ("new", "already"),
        ("a.b", "adapter name 'a.b'"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.rename_adapter("new", new)
    with pytest.raises(ValueError, match=r"there is no adapter 'nwe'; .*did you mean 'new'"):
        model.rename_adapter("nwe", "x")


# -- names ---------------------------------------------------------------------------------------


def test_parameter_names_are_pefts() -> None:
    model, _ = adapted("emb", "fc1", "conv", modules_to_save=["head"])
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.emb.lora_embedding_A.default",
        "base_model.model.emb.lora_embedding_B.default",
        "base_model.model.fc1.lora_A.default.weight",
        "base_model.model.fc1.lora_B.default.weight",
        "base_model.model.conv.lora_A.default.weight",
        "base_model.model.conv.lora_B.default.weight",
        "base_model.model.head.modules_to_save.default.weight",
        "base_model.model.head.modules_to_save.default.bias",
    ]


@given(
    st.permutations(
        ["a", "ab", "b", "fc1", "lora_A", "weight", "head", "base_layer", "modules_to_save", "0", "x y-z", "é"]
    )
)
@settings(deadline=None, max_examples=8)
def test_names_that_contain_each_other_or_are_names_of_modules(names: list[str]) -> None:
    """Each adapter answers with its own output, also after the deletion and the renaming of others."""
    model, _ = adapted("emb", "fc1", modules_to_save=["head"])
    want = {}
    for name in names:
        model.add_adapter(name, config("emb", "fc1", modules_to_save=["head"]))
        model.set_adapter(name)
        want[name] = model(TOKENS)
    for name in names[::3]:
        model.delete_adapter(name)
        del want[name]
    model.rename_adapter(names[1], "default_2")
    want["default_2"] = want.pop(names[1])
    for name, y in want.items():
        model.set_adapter(name)
        assert torch.equal(model(TOKENS), y)
        model.merge_adapter()
        agree(model(TOKENS), y)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a.b",
        "a/b",
        "../a",
        "__base__",
        "forward",
        "training",
        "keys",
        "pop",
        "_modules",
        "_keys",
        "a\n",
        "\0",
        1,
        None,
    ],
)
def test_illegal_names(name: Any) -> None:
    torch.manual_seed(0)
    net = Net()
    with pytest.raises(ValueError, match="adapter name"):
        get_peft_model(net, config(), adapter_name=name)
    assert type(net.fc1) is nn.Linear and all(p.requires_grad for p in net.parameters())
    model = get_peft_model(net, config("fc1", "emb", modules_to_save=["head"]))
    with pytest.raises(ValueError, match="adapter name"):
        model.add_adapter(name, config())
    assert list(model.peft_config) == ["default"]


def test_adapting_twice_is_refused() -> None:
    model, net = adapted()
    with pytest.raises(ValueError, match="adapted already: use its add_adapter"):
        get_peft_model(model, config())
    with pytest.raises(ValueError, match="has adapters already"):
        get_peft_model(net, config())


def test_the_users_config_is_not_touched() -> None:
    mine = config("fc1", rank_pattern={"fc1": 4})
    before = copy.deepcopy(vars(mine))
    model = get_peft_model(Net(), mine)
    assert vars(mine) == before
    mine.r = 100
    mine.rank_pattern["fc1"] = 7
    assert model.peft_config["default"].r == 2 and model.peft_config["default"].rank_pattern == {"fc1": 4}


# -- weighted combinations -----------------------------------------------------------------------------


def deltas(model: PeftModel, name: str) -> dict[str, Tensor]:
    """The explicit update of each layer of an adapter, a grouped convolution's by group."""
    found = {}
    for where, layer in model.lora_layers().items():
        if name in layer.adapters():
            A, B = (f.detach() for f in layer.factors(name))
            found[where] = layer.scaling[name] * B @ A
    return found


FAMILY = ("emb", "fc1", "fc2", "conv")


def family() -> PeftModel:
    """Parents of all sorts: ranks, rsLoRA, patterns, layers that only one has, a scale set by hand."""
    model, _ = adapted("emb", "fc1", "conv", r=2)
    model.add_adapter("rs", config("emb", "fc1", "fc2", "conv", r=4, use_rslora=True, rank_pattern={"fc1": 3}))
    model.add_adapter("pattern", config("fc2", "emb", r=2, rank_pattern={"fc2": 1}, alpha_pattern={"emb": -5}))
    model.set_scale("pattern", 1.5)
    return model


@given(
    st.lists(st.sampled_from(["default", "rs", "pattern"]), min_size=1, max_size=3, unique=True),
    st.lists(st.floats(-2, 2), min_size=3, max_size=3),
    st.sampled_from(["cat", "svd"]),
)
@settings(deadline=None, max_examples=30)
def test_cat_and_svd_are_the_weighted_sum(names: list[str], weights: list[float], kind: str) -> None:
    """U9: exact for cat, with any sign; for svd where the rank suffices; s = 1; nothing else is touched."""
    model = family()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parents = {name: deltas(model, name) for name in names}
    weights = weights[: len(names)]
    model.add_weighted_adapter(names, weights, "new", kind, svd_rank=12 if kind == "svd" else None)
    got = deltas(model, "new")
    assert set(got) == {where for parent in parents.values() for where in parent}
    for where, D in got.items():
        want = sum(w * parents[n][where] for n, w in zip(names, weights, strict=True) if where in parents[n])
        agree(D, want, what=where)
        layer = model.lora_layers()[where]
        assert layer.scaling["new"] == 1
        assert layer.r["new"] == (12 if kind == "svd" else sum(layer.r.get(n, 0) for n in names))
    assert model.active_adapters == ["default"] and model.peft_config["new"].init_lora_weights is True
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert not any(p.requires_grad for n, p in after.items() if n not in before)


@pytest.mark.parametrize("name", ["default", "rs", "pattern"])
@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_one_adapter_with_weight_one_is_itself(name: str, kind: str) -> None:
    model = family()
    model.set_adapter(name)
    y = model(TOKENS)
    model.add_weighted_adapter([name], [1.0], "new", kind)
    model.set_adapter("new")
    agree(model(TOKENS), y)


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_a_combination_survives_saving(kind: str, tmp_path: Any) -> None:
    model = family()
    names = ["default", "rs"] if kind != "linear" else ["rs"]
    model.add_weighted_adapter(names, [0.5, -1.0][: len(names)], "new", kind)
    model.set_adapter("new")
    y = model(TOKENS)
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    torch.manual_seed(0)
    agree(PeftModel.from_pretrained(Net().double().eval(), tmp_path / "new")(TOKENS), y)


def test_linear_adds_factors() -> None:
    """sqrt|w s| into each factor, the sign into A; cross terms appear."""
    model, _ = adapted("fc1", "emb", "conv")
    model.add_adapter("b", config("fc1", "emb", "conv", use_rslora=True))
    layers, weights = model.lora_layers(), [0.5, -2.0]
    model.add_weighted_adapter(["default", "b"], weights, "new", "linear")
    for layer in layers.values():
        As, Bs = zip(*(layer.factors(n) for n in ("default", "b")), strict=True)
        ws = [w * layer.scaling[n] for n, w in zip(("default", "b"), weights, strict=True)]
        A, B = layer.factors("new")
        agree(A, sum(math.copysign(math.sqrt(abs(s)), s) * x for s, x in zip(ws, As, strict=True)))
        agree(B, sum(math.sqrt(abs(s)) * x for s, x in zip(ws, Bs, strict=True)))


def test_svd_is_the_best_of_its_rank() -> None:
    """Eckart-Young: the error is the tail of the singular values."""
    model, _ = adapted("fc1", r=3)
    model.add_adapter("b", config("fc1", r=3))
    target = deltas(model, "default")["fc1"] + deltas(model, "b")["fc1"]
    S = torch.linalg.svdvals(target)
    for rank in (1, 2, 4):
        model.add_weighted_adapter(["default", "b"], [1, 1], f"r{rank}", "svd", svd_rank=rank)
        error = (target - deltas(model, f"r{rank}")["fc1"]).norm()
        agree(error, S[rank:].norm(), size=S[0].item())


def test_combinations_of_experts() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Experts(3, 4, 5)).double()
    options: dict[str, Any] = {"target_modules": [], "target_parameters": ["0.stack"], "init_lora_weights": False}
    model = get_peft_model(net, LoraConfig(r=2, **options))
    model.add_adapter("b", LoraConfig(r=1, lora_alpha=-2, **options))
    want = deltas(model, "default")["0.stack"] * 2 - deltas(model, "b")["0.stack"]
    for kind in ("cat", "svd"):
        model.add_weighted_adapter(["default", "b"], [2, -1], kind, kind, svd_rank=3 if kind == "svd" else None)
        agree(deltas(model, kind)["0.stack"], want)


def test_a_combination_of_parents_whose_options_exclude_each_other() -> None:
    """Raw parameters go with neither dropout nor fan_in_fan_out, which the first parent has."""
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(5, 5), Experts(3, 4, 5)).double().eval()
    first = LoraConfig(r=1, target_modules=["0"], fan_in_fan_out=True, lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(net, first)
    model.add_adapter("b", LoraConfig(r=1, target_modules=[], target_parameters=["1.stack"], init_lora_weights=False))
    x = torch.randn(2, 5).double()
    model.set_adapter(["default", "b"])
    y = model(x)
    model.add_weighted_adapter(["default", "b"], [1, 1], "new", "cat")
    model.set_adapter("new")
    agree(model(x), y)


def test_a_combination_adapts_no_further_modules() -> None:
    """Names in a list match longer names with the same end: 'fc' would match 'block.fc' too."""
    net = nn.ModuleDict({"fc": nn.Linear(3, 3), "block": nn.ModuleDict({"fc": nn.Linear(3, 3)})})
    model = get_peft_model(net, LoraConfig(r=2, target_modules="fc"))
    assert list(model.lora_layers()) == ["fc"]
    model.add_weighted_adapter(["default"], [1.0], "new")
    assert list(model.lora_layers()) == ["fc"]


def test_all_linear_adapts_linear_layers_only() -> None:
    """'1.0' ends like '0': the names that all-linear stands for must not match other modules."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(net, LoraConfig(r=2, target_modules="all-linear"))
    assert list(model.lora_layers()) == ["0", "1.1"]


def test_a_combination_takes_over_the_only_head() -> None:
    model, net = adapted("fc1", modules_to_save=["head"])
    model.add_adapter("b", config("fc1"))
    train(model)
    model.add_weighted_adapter(["b", "default"], [1, 1], "new", "cat")
    heads = net.head.modules_to_save
    assert torch.equal(heads["new"].weight, heads["default"].weight) and heads["new"] is not heads["default"]
    model.add_adapter("c", config("fc1", modules_to_save=["head"]))
    with pytest.raises(ValueError, match="more than one of the adapters saves head whole"):
        model.add_weighted_adapter(["c", "default"], [1, 1], "newer", "cat")
    assert "newer" not in model.peft_config


@pytest.mark.parametrize(
    "adapters, weights, kind, rank, message",
    [
        (["default"], [1, 2], "cat", None, "1 adapters and 2 weights"),
        ([], [], "cat", None, "0 adapters and 0 weights"),
        (["nobody"], [1], "cat", None, "there is no adapter 'nobody'"),
        (["default"], [math.nan], "cat", None, "must be finite"),
        (["default"], [1], "ties", None, "combination_type='ties'"),
        (["default", "rs"], [1, 1], "linear", None, "^emb: combination_type='linear' needs equal ranks"),
        (["default"], [1], "svd", 0, "svd_rank=0: the rank must be an int > 0"),
        (["default"], [1], "svd", -1, "svd_rank=-1"),
        (["default"], [1], "svd", 1.5, "svd_rank=1.5"),
        (["default"], [1], "svd", 3, "svd_rank=3 must be divisible by groups=2"),
    ],
)
def test_combinations_that_are_refused(adapters: list, weights: list, kind: str, rank: Any, message: str) -> None:
    model = family()
    before = [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, "new", kind, rank)
    assert [n for n, _ in model.named_parameters()] == before and "new" not in model.peft_config


# -- adapters by sample ----------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["default", "rs", "pattern", "headed", "__base__"]), min_size=3, max_size=3))
@settings(deadline=None, max_examples=30)
def test_each_sample_its_own_adapter(names: list[str]) -> None:
    """U8: equal to separate runs, whatever is active."""
    model = family()
    model.add_adapter("headed", config("fc1", modules_to_save=["head"]))
    model.set_adapter("headed")
    train(model.train())
    model.eval()
    want = []
    for i, name in enumerate(names):
        model.set_adapter([] if name == "__base__" else name)
        want.append(model(TOKENS[i : i + 1]))
    for active in ("headed", ["default", "rs"], []):
        model.set_adapter(active)
        y = model(TOKENS)
        agree(model(TOKENS, adapter_names=names), torch.cat(want))
        assert torch.equal(model(TOKENS), y)  # and nothing stays
    with model.disable_adapter():
        off = model(TOKENS)
        assert torch.equal(model(TOKENS, adapter_names=names), off)


def test_mixed_batches_that_are_refused() -> None:
    model, _ = adapted()
    y = model(TOKENS)
    for names in (["default"], ["default"] * 4, []):
        with pytest.raises(ValueError, match=rf"adapter_names has {len(names)} names for a batch of 3 samples"):
            model(TOKENS, adapter_names=names)
        assert torch.equal(model(TOKENS), y)
    with pytest.raises(ValueError, match="there is no adapter 'nobody'"):
        model(TOKENS, adapter_names=["nobody"] * 3)
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        model.train()(TOKENS, adapter_names=["default"] * 3)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="mixing adapters in a batch is not possible while default is merged"):
        model(TOKENS, adapter_names=["default"] * 3)
    agree(model(TOKENS), y)


def test_mixed_batches_and_raw_parameters() -> None:
    """Refused for an adapter of the parameter; the others may mix, though the wrapper is there."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), Experts(3, 4, 5)).double().eval()
    model = get_peft_model(net, LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(2, 5).double()
    y = model(x)
    options: dict[str, Any] = {"target_parameters": ["1.stack"], "init_lora_weights": False}
    model.add_adapter("experts", LoraConfig(r=1, target_modules=[], **options))
    with pytest.raises(ValueError, match="adapter_names is not possible with target_parameters"):
        model(x, adapter_names=["default", "experts"])
    agree(model(x, adapter_names=["default", "default"]), y)


# -- texts -------------------------------------------------------------------------------------------------


def test_repr_and_print_trainable_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = adapted("fc1")
    model.add_adapter("b", config("fc1", "fc2", r=3))
    model.merge_adapter(["b"])
    trainable, total = 2 * (8 + 6), sum(p.numel() for p in model.parameters())
    assert repr(model) == (
        f"PeftModel(Net, {total} parameters, {trainable} trainable)\n"
        "  default [active]: 1 layers, r=2, lora_alpha=3\n"
        "  b [merged]: 2 layers, r=3, lora_alpha=3"
    )
    model.print_trainable_parameters()
    percent = f"{100 * trainable / total:.4f}"
    assert capsys.readouterr().out == f"trainable params: {trainable} || all params: {total} || trainable%: {percent}\n"
    assert model.get_nb_trainable_parameters() == (trainable, total)


def test_large_counts_have_separators(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(1000, 1000)), LoraConfig(r=8, target_modules=["0"]))
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 16,000 || all params: 1,017,000 || trainable%: 1.5733\n"


def test_attributes_reach_through_to_the_base() -> None:
    model, net = adapted()
    assert model.fc1 is net.fc1 and model.get_base_model() is net and model.fc1.in_features == 8
    with pytest.raises(AttributeError):
        _ = model.nothing_of_the_kind


def test_what_is_assumed_where_nothing_is_said(tmp_path: Any) -> None:
    """Factors of a half-precision model are float32; an adapter that is loaded is for inference."""
    model = PeftModel(nn.Sequential(nn.Linear(2, 2)).bfloat16(), LoraConfig(r=1, target_modules=["0"]))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "b")
    model.load_adapter(tmp_path, "c", is_trainable=True)
    assert [model.peft_config[name].inference_mode for name in ("default", "b", "c")] == [False, True, False]


def test_a_model_that_is_being_made_has_no_attributes() -> None:
    """As when it is unpickled: to ask the base model, which is not there yet, would not end."""
    assert not hasattr(PeftModel.__new__(PeftModel), "base_model")


def test_copies_of_an_adapted_model_do_not_ask_for_what_is_not_there_yet() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    x = torch.ones(1, 4)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    bare = type(model.base_model).__new__(type(model.base_model))
    nn.Module.__init__(bare)
    with pytest.raises(AttributeError, match="model"):
        bare.model  # noqa: B018


@pytest.mark.parametrize("name", ["A", "0", "a b", "-", "_", "zz"])
def test_names_of_letters_digits_dashes_and_spaces(name: str) -> None:
    model, _ = adapted("fc1")
    model.add_adapter(name, config("fc1"))
    model.set_adapter(name)
    assert model.active_adapters == [name] and model.active_peft_config is model.peft_config[name]


def test_the_configuration_that_is_active_is_that_of_the_first_adapter() -> None:
    model, _ = adapted("fc1")
    model.add_adapter("b", config("fc1", r=3))
    model.set_adapter(["b", "default"])
    assert model.active_peft_config is model.peft_config["b"]


@pytest.mark.parametrize("off", [False, True])
def test_a_layer_that_is_adapted_first_in_a_context_is_off_afterwards_where_the_others_are(off: bool) -> None:
    model, net = adapted("fc1")
    if off:
        model.disable_adapter_layers()
    with model.disable_adapter():
        model.add_adapter("c", config("fc2"))
        assert net.fc2.disable_adapters
    assert net.fc1.disable_adapters is off and net.fc2.disable_adapters is off


def test_renaming_one_of_several_active_adapters() -> None:
    model, _ = adapted("fc1")
    for name in ("a", "z"):
        model.add_adapter(name, config("fc1"))
    model.set_adapter(["a", "default", "z"])
    model.rename_adapter("default", "m")
    assert model.active_adapters == ["a", "m", "z"] and list(model.peft_config) == ["m", "a", "z"]
    assert {tuple(layer.active_adapters) for layer in model.lora_layers().values()} == {("a", "m", "z")}


def test_the_name_of_the_base_model_is_noted_unless_the_user_has_one() -> None:
    for asked, want in ((None, "of the model"), ("of the user", "of the user")):
        net = plain_net()
        net.name_or_path = "of the model"
        model = get_peft_model(net, config("fc1", base_model_name_or_path=asked))
        assert model.peft_config["default"].base_model_name_or_path == want


def test_only_layers_of_the_merged_adapter_must_be_plain() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(net, config("0", init_lora_weights=False))
    model.add_adapter("other", config("1"))
    prune.identity(model.lora_layers()["1"].get_base_layer(), "weight")
    model.merge_adapter()
    assert model.lora_layers()["0"].merged_adapters == ["default"]
    with pytest.raises(ValueError, match="1: the base is a Linear that does not store its weight"):
        model.merge_adapter("other")


def test_a_copy_of_a_saved_module_is_frozen_until_its_adapter_is_active() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(net, config("0", modules_to_save=["1"]))
    model.add_adapter("other", config("0", modules_to_save=["1"]))
    copies = model.base_model.model[1].modules_to_save
    assert [{p.requires_grad for p in copies[name].parameters()} for name in ("default", "other")] == [{True}, {False}]


# -- layers that are switched off, and biases of other names ---------------------------------------


@pytest.mark.parametrize("cls", [core.LoraModel, LoraModel])
def test_a_layer_that_was_switched_off_by_hand_stays_off_and_the_others_on(cls: Any) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model = cls(net)
    model.add_adapter("default", LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    model.set_adapter("default")
    first, second = model.lora_layers().values()
    first.enable_adapters(False)
    x = torch.ones(2, 3).double()
    y = model(x)
    for _ in range(2):
        with model.disable_adapter():
            assert first.disable_adapters and second.disable_adapters
        assert first.disable_adapters and not second.disable_adapters
        assert torch.equal(model(x), y)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "1"]))
    assert first.disable_adapters and not second.disable_adapters
    model.set_adapter("default")
    assert first.disable_adapters and not second.disable_adapters
    assert torch.equal(model(x), y)
    trains = [p.requires_grad for layer in (first, second) for p in layer.parameters()]
    assert trains == [False] * 6 + [False, False, True, False, True, False]


@pytest.mark.parametrize("cls", [core.LoraModel, LoraModel])
def test_disabled_adapters_do_not_train(cls: Any) -> None:
    model = cls(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)))
    config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"])
    model.add_adapter("default", config)
    model.add_adapter("other", config)
    model.set_adapter("default")

    def trains() -> list[str]:
        return [name for name, p in model.named_parameters() if p.requires_grad]

    before = trains()
    assert len(before) == 6 and all("default" in name for name in before)
    model.disable_adapter_layers()
    assert not trains()
    model.disable_adapter_layers()  # twice is once
    model.enable_adapter_layers()
    assert trains() == before
    with model.disable_adapter():
        assert not trains()
    assert trains() == before
    model.disable_adapter_layers()
    model.set_adapter("other")  # it trains when the layers are on again
    assert not trains()
    model.enable_adapter_layers()
    assert trains() == [name.replace("default", "other") for name in before]
    model.set_adapter("other", inference_mode=True)
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert not trains()


def test_all_biases_are_those_that_are_called_so() -> None:
    """B2: `bias`, `*_bias` and `bias_*`; not a weight of a module called so, nor a factor of an adapter called so."""

    class Others(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.attention = nn.GRU(4, 4), nn.MultiheadAttention(4, 2, add_bias_kv=True)
            self.up, self.norm, self.relative_bias = nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(3, 2)
            self.gate_up_proj_bias, self.unbiased = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    model = get_peft_model(Others(), LoraConfig(r=2, target_modules=["up", "relative_bias"], bias="all"), "bias")
    trained = [n for n, p in model.get_base_model().named_parameters() if p.requires_grad and "lora_" not in n]
    gates = ["gru.bias_ih_l0", "gru.bias_hh_l0"]
    inside = ["attention.in_proj_bias", "attention.bias_k", "attention.bias_v", "attention.out_proj.bias"]
    assert sorted(trained) == sorted([*gates, *inside, "gate_up_proj_bias", "norm.bias", "up.base_layer.bias"])
    model.set_adapter("bias", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    only = get_peft_model(Others(), LoraConfig(r=2, target_modules=["up", "relative_bias"], bias="lora_only"), "bias")
    assert [n for n, p in only.get_base_model().named_parameters() if p.requires_grad and "lora_" not in n] == [
        "up.base_layer.bias"
    ]
