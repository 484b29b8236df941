"""Inits that start from an update that is not 0: the layer subtracts that update, and the base weight never changes.

Every formula is written out in float64: an adapter with the initial update D0 contributes s B A - D0 to the base
model, whatever else is active, merged, disabled or deleted.
"""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import llama
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from lora_ref import CordaConfig, LoftQConfig, LoraConfig, LoraGAConfig, PeftModel, get_peft_model, init
from lora_ref.calibration.preprocess import preprocess_corda, preprocess_loraga
from spec_tests import agree, close, distance

CHANGING = ["pissa", "pissa_niter_2", "olora", "corda", "lora_ga", "loftq"]
LOW_RANK = CHANGING[:-1]
X = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A Linear and a Conv1D (which stores W^T), both to be adapted, and a head that is not."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down, self.head = nn.Linear(12, 16), Conv1D(10, 16), nn.Linear(10, 3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape) / 3)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def config(value: bool | str, **options: Any) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["up", "down"], "fan_in_fan_out": False} | options
    if value == "loftq":
        options.setdefault("loftq_config", LoftQConfig(loftq_bits=2, loftq_iter=2))
    if value == "corda":
        options.setdefault("corda_config", CordaConfig())
    if value == "lora_ga":
        options.setdefault("lora_ga_config", LoraGAConfig())
    return LoraConfig(init_lora_weights=value, **options)


def prepare(net: nn.Module, cfg: LoraConfig) -> None:
    """The pass over data that some methods need first."""
    x = X.to(next(net.parameters()).dtype)

    def train_step() -> None:
        net.zero_grad()
        net(x).square().mean().backward()

    if cfg.init_lora_weights == "corda":
        preprocess_corda(net, cfg, run_model=lambda: net(x))
    if cfg.init_lora_weights == "lora_ga":
        preprocess_loraga(net, cfg, train_step)


def adapt(value: bool | str, net: nn.Module | None = None, **options: Any) -> PeftModel:
    net, cfg = net or Net(), config(value, **options)
    prepare(net, cfg)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        return get_peft_model(net, cfg)


def add(model: PeftModel, name: str, value: bool | str, **options: Any) -> None:
    """A further adapter. What it needs of data it looks at the original model for."""
    cfg = config(value, **options)
    if init.METHODS[init.method_of(value)].prepare:
        plain = Net()
        prepare(plain, cfg)
        for layer, bare in zip(model.lora_layers().values(), (plain.up, plain.down), strict=True):
            layer.get_base_layer().prepared_init = bare.prepared_init
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        model.add_adapter(name, cfg)


def train(model: PeftModel, name: str = "default", seed: int = 1) -> None:
    """Move A and B of one adapter somewhere else."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.lora_layers().values():
        for factor in layer.factors(name):
            factor.data += 0.2 * torch.randn(factor.shape, dtype=factor.dtype, generator=generator)


def update(model: PeftModel, name: str, layer_name: str, original: Tensor) -> Tensor:
    """s B A - D0 (logical), from the tensors of the model."""
    layer = model.lora_layers()[layer_name]
    A, B = (f.detach() for f in layer.factors(name))
    D = layer.scaling[name] * B @ A
    return D - layer.lora_initial[name].matrix() if name in layer.lora_initial else D


def explicit(model: PeftModel, *names: str) -> Tensor:
    """The original model with these adapters' updates added to its weights."""
    net = Net()
    with torch.no_grad():
        for name in names:
            net.up.weight += update(model, name, "up", net.up.weight)
            net.down.weight += update(model, name, "down", net.down.weight.T).T
    return net(X).detach()


#: So many times nearer to the right result: less than half of what float16 and float32 have digits for.
TIMES = {torch.bfloat16: 16, torch.float16: 100, torch.float32: 100_000}


def nearest(got: Tensor, right: Tensor, wrong: Tensor, times: int = 0) -> bool:
    """Is a result of narrow numbers so many times nearer to what is right than that is to what a fault would give?

    The worst case of all roundings of three layers in half precision is larger than their output. This asks what the
    test is about: which weights the output was computed from.
    """
    return distance(got, right) * (times or TIMES[got.dtype]) < distance(wrong, right)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


# -- the start ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", LOW_RANK)
def test_residual_and_update_make_up_the_original_weight(value: str) -> None:
    net = Net()
    before = weights(net)
    model = adapt(value, net)
    for name, layer in model.lora_layers().items():
        A, B = layer.factors("default")
        W = before[f"{name}.weight"]
        residual = layer.residual("default")
        agree(layer.stored(residual + layer.scaling["default"] * (B @ A)), W)
        assert torch.equal(layer.base_weight, W) and distance(residual, layer.logical(W)) > 0.01
    agree(model(X), Net()(X))


@pytest.mark.parametrize("value", CHANGING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_the_adapter_it_is_the_base_bit_for_bit(value: str, dtype: torch.dtype) -> None:
    """Off, another one active, deleted, unloaded; trained before, merged before or not."""
    base, x = Net(dtype), X.to(dtype)
    wanted, W = base(x), weights(base)

    def is_the_base(model: nn.Module) -> None:
        assert torch.equal(model(x), wanted)
        layers = model.lora_layers() if isinstance(model, PeftModel) else {"up": model.up, "down": model.down}
        for name, layer in layers.items():
            weight = layer.base_weight if isinstance(model, PeftModel) else layer.weight
            assert torch.equal(weight, W[f"{name}.weight"])

    model = adapt(value, Net(dtype))
    if value != "loftq":  # its start is a quantised weight
        start, y = model(x).detach(), wanted.detach()
        u = torch.finfo(dtype).eps / 2
        assert ((start - y).abs() <= 2 * u * y.abs().max()).all(), "the rounding of one sum"
    train(model)
    assert not torch.equal(model(x), wanted)
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        with model.disable_adapter():
            is_the_base(model)
    model.unmerge_adapter()
    is_the_base(copy.deepcopy(model).unload())
    add(model, "other", True)  # B = 0: as the base
    model.set_adapter("other")
    is_the_base(model)
    model.set_adapter("default")
    model.delete_adapter("default")
    is_the_base(model)
    is_the_base(model.unload())


def test_the_base_of_loftq_is_a_quantised_weight() -> None:
    model = adapt("loftq", target_modules=["up"], loftq_config=LoftQConfig(loftq_bits=2, loftq_iter=1))
    layer = model.lora_layers()["up"]
    residual = layer.residual("default")
    blocks = residual.reshape(-1, 64)
    assert all(len(block.unique()) <= 4 for block in blocks), "2 bits are 4 values a block"
    A, B = layer.factors("default")
    W = Net().up.weight
    adapted = residual + layer.scaling["default"] * (B @ A)
    assert torch.equal(layer.base_weight, W)
    assert torch.linalg.norm(adapted - W) < 0.9 * torch.linalg.norm(residual - W)


@pytest.mark.parametrize("value", [*CHANGING, "orthogonal", "gaussian", True, "eva"])
def test_a_conv1d_starts_as_the_linear_with_the_transposed_array(value: bool | str) -> None:
    conv, linear = nn.Sequential(Conv1D(10, 12)), nn.Sequential(nn.Linear(12, 10))
    with torch.no_grad():
        linear[0].weight.copy_(conv[0].weight.T)
        linear[0].bias.copy_(conv[0].bias)
    found = []
    for net in (conv, linear):
        net.double()
        cfg = config(value, target_modules=["0"], r=2)  # LoRA-GA takes 2 r directions; 7 samples have no more
        prepare(net, cfg)
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            layer = get_peft_model(net, cfg).lora_layers()["0"]
        found.append([layer.residual("default"), *layer.factors("default")])
    for one, other in zip(*found, strict=True):
        agree(one, other, what=str(value))


@pytest.mark.parametrize("value", LOW_RANK)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_only_the_rounding_of_the_residual_is_lost(value: str, dtype: torch.dtype) -> None:
    net = Net(dtype)
    before = weights(net)
    model = adapt(value, net)
    for name, layer in model.lora_layers().items():
        A, B = (f.double() for f in layer.factors("default"))
        assert layer.factors("default")[0].dtype == torch.float32 and layer.base_weight.dtype == dtype
        residual = layer.stored(layer.residual("default")).double()
        lost = before[f"{name}.weight"].double() - residual - layer.stored(layer.scaling["default"] * (B @ A))
        # half a unit in the last place of the residual, and float32's rounding of what it was computed from
        size = before[f"{name}.weight"].double().abs() + layer.stored(layer.scaling["default"] * (B.abs() @ A.abs()))
        u = torch.finfo(dtype).eps / 2
        # (4 products, the scaling, the difference, two for the factors; a float16 is off by 2^-25 where it underflows)
        assert (lost.abs() <= u * residual.abs() * 1.01 + 8 * 2**-24 * size + 2**-25).all()


@pytest.mark.parametrize("value", ["pissa", "olora"])
def test_training_goes_as_in_peft(value: str) -> None:
    """Signs and rotations of the factors are free, and plain gradient descent does not see them."""
    outputs, starts = [], []
    for library, cls in ((None, LoraConfig), (peft, peft.LoraConfig)):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
        cfg = cls(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=value)
        model = library.get_peft_model(net, cfg) if library else get_peft_model(net, cfg)
        starts.append(model(X.float()).detach())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            model(X.float()).square().mean().backward()
            optimizer.step()
        outputs.append(model(X.float()).detach())
    # PEFT decomposes float32 at most; a part of a thousand of what training changes is far above its roundings
    assert nearest(outputs[0], outputs[1], starts[1], times=1000)


# -- the original is there ---------------------------------------------------------------------


@pytest.mark.parametrize("value", CHANGING)
def test_disabled_it_is_the_original_model_merged_or_not(value: str) -> None:
    model = adapt(value)
    train(model)
    adapted = model(X)
    agree(adapted, explicit(model, "default"))
    assert distance(adapted, Net()(X)) > 0.01
    for merged in (False, True):
        if merged:
            model.merge_adapter()
            agree(model(X), adapted)
        before = weights(model)
        with model.disable_adapter():
            agree(model(X), Net()(X))
        agree(model(X), adapted)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    model.unmerge_adapter()
    assert torch.equal(model(X), adapted)


@pytest.mark.parametrize("value", CHANGING)
def test_an_adapter_may_be_deleted_while_another_one_is_merged(value: str) -> None:
    model = adapt(value)
    train(model)
    add(model, "other", True)
    train(model, "other", seed=2)
    model.set_adapter("other")
    agree(model(X), explicit(model, "other"))
    model.merge_adapter()
    model.delete_adapter("default")
    agree(model(X), explicit(model, "other"))
    model.unmerge_adapter()
    plain = model.unload()
    assert torch.equal(plain(X), Net()(X)) and list(plain.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize("value", CHANGING)
def test_merge_and_unload_is_the_original_plus_the_chosen_updates(value: str) -> None:
    for chosen in (["default"], ["second"], ["default", "second"]):
        model = adapt(value)
        add(model, "second", "pissa" if value == "olora" else "olora", r=3, use_rslora=True)
        for i, name in enumerate(("default", "second")):
            train(model, name, seed=i)
        wanted = explicit(model, *chosen)
        agree(model.merge_and_unload(adapter_names=chosen)(X), wanted, what=str(chosen))


@pytest.mark.parametrize("value", CHANGING)
def test_several_adapters_each_speak_of_the_original(value: str) -> None:
    """All subsets of three adapters active: the sum of their updates of the original weight."""
    model = adapt(value)
    add(model, "second", "olora", r=3)
    add(model, "plain", True, r=2)
    names = ["default", "second", "plain"]
    for i, name in enumerate(names):
        train(model, name, seed=i)
    for k in range(1, 4):
        for active in itertools.permutations(names, k):
            model.set_adapter(list(active))
            wanted = explicit(model, *active)
            agree(model(X), wanted)
            model.merge_adapter([active[0]])
            agree(model(X), wanted)
            model.unmerge_adapter()
    model.set_adapter("default")
    for merged in names:
        model.merge_adapter([merged])
        agree(model(X), explicit(model, *dict.fromkeys(["default", merged])))
        model.unmerge_adapter()


@pytest.mark.parametrize("value", ["pissa", "olora", "loftq", "mica"])
@pytest.mark.parametrize("other", ["pissa", True])
def test_an_initialisation_looks_at_the_original_weight(value: str, other: bool | str) -> None:
    """Not at what another one has left of it, nor, where that is allowed, at a merged one."""
    model = adapt(other)
    train(model)
    if value == "mica":
        model.merge_adapter()
    add(model, "second", value)
    for layer, first in zip(model.lora_layers().values(), adapt(value).lora_layers().values(), strict=True):
        for factor, wanted in zip(layer.factors("second"), first.factors("default"), strict=True):
            agree(factor, wanted)


@pytest.mark.parametrize("value", CHANGING)
def test_a_batch_may_mix_them_with_the_base(value: str) -> None:
    model = adapt(value)
    add(model, "second", "pissa")
    for name in ("default", "second"):
        train(model, name)
    rows = ["__base__", "default", "second", "default", "__base__", "second", "default"]
    y = model.eval()(X, adapter_names=rows)
    for i, name in enumerate(rows):
        agree(y[i], explicit(model, *([name] if name != "__base__" else []))[i])


@pytest.mark.parametrize("value", CHANGING)
def test_renaming_copying_and_state_dicts_keep_it(value: str) -> None:
    model = adapt(value)
    train(model)
    wanted = model(X)
    twin = adapt(value, Net(seed=5))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(X), wanted)
    model.rename_adapter("default", "renamed")
    assert torch.equal(copy.deepcopy(model)(X), wanted)
    for m in (model, twin):
        with m.disable_adapter():
            agree(m(X), Net()(X))


def test_what_happens_inside_disable_adapter_stays_right() -> None:
    model = adapt("pissa")
    add(model, "second", "olora")
    train(model), train(model, "second")
    with model.disable_adapter():
        model.delete_adapter("second")
        agree(model(X), Net()(X))
    agree(model(X), explicit(model, "default"))
    with model.disable_adapter():
        add(model, "third", "pissa", r=2)
        agree(model(X), Net()(X))
    agree(model(X), explicit(model, "default"))
    model.merge_adapter()
    with model.disable_adapter():
        model.delete_adapter("third")
    agree(model(X), explicit(model, "default"))
    model.unmerge_adapter()
    agree(model(X), explicit(model, "default"))


@pytest.mark.parametrize("what", ["rename", "add", "delete"])
@pytest.mark.parametrize("off", [False, True])
def test_what_was_merged_is_merged_again_after_disable_adapter(what: str, off: bool) -> None:
    """Though the weights that were put aside are not right any more; merged, not active: its output shows it."""
    model = adapt("pissa")
    add(model, "second", "olora"), add(model, "plain", True)
    for i, name in enumerate(["default", "second", "plain"]):
        train(model, name, seed=i)
    model.set_adapter("default")
    model.merge_adapter(["second", "plain"])
    if off:
        model.disable_adapter_layers()
    with model.disable_adapter():
        model.unmerge_adapter()
        if what == "rename":
            model.rename_adapter("default", "renamed")
        elif what == "add":
            add(model, "third", "pissa")
        else:
            model.delete_adapter("second")
    left = ["plain"] if what == "delete" else ["second", "plain"]
    assert all(layer.merged_adapters == left for layer in model.lora_layers().values())
    if off:
        agree(model(X), Net()(X))
        model.enable_adapter_layers()
    wanted = explicit(model, "renamed" if what == "rename" else "default", *left)
    agree(model(X), wanted)
    model.unmerge_adapter()
    model.set_adapter(["renamed" if what == "rename" else "default", *left])
    agree(model(X), wanted)


def test_what_was_merged_inside_disable_adapter_is_not_afterwards() -> None:
    model = adapt("pissa")
    add(model, "plain", True)
    train(model, "plain")
    model.set_adapter([])
    with model.disable_adapter():
        model.enable_adapter_layers()
        model.merge_adapter("plain")
        model.delete_adapter("default")
    assert not any(layer.merged for layer in model.lora_layers().values())
    agree(model(X), Net()(X))


@pytest.mark.parametrize("value", CHANGING)
def test_merge_and_unload_keeps_what_was_merged_before(value: str) -> None:
    model = adapt(value)
    add(model, "plain", True)
    train(model), train(model, "plain")
    model.set_adapter("plain")
    model.merge_adapter(["default"])
    wanted = explicit(model, "default", "plain")
    agree(model(X), wanted)
    agree(model.merge_and_unload()(X), wanted)


@pytest.mark.parametrize("combination", ["cat", "svd"])
def test_weighted_combinations_combine_the_updates_of_the_original(combination: str) -> None:
    model = adapt("pissa", r=3)
    add(model, "second", True, r=2)
    train(model), train(model, "second")
    model.set_scale("default", 1.7)
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "both", combination, svd_rank=10)
    for name in ("up", "down"):
        W = model.lora_layers()[name].logical_weight()
        wanted = 0.5 * update(model, "default", name, W) - 2.0 * update(model, "second", name, W)
        agree(update(model, "both", name, W), wanted)
    model.set_adapter("both")
    agree(model(X), explicit(model, "both"))


def test_the_default_rank_of_a_weighted_svd_has_room_for_what_was_taken() -> None:
    model = adapt("pissa", r=3)
    train(model)
    model.add_weighted_adapter(["default"], [0.5], "scaled")
    for name, layer in model.lora_layers().items():
        assert layer.r["scaled"] == 6
        W = layer.logical_weight()
        agree(update(model, "scaled", name, W), 0.5 * update(model, "default", name, W))


@pytest.mark.parametrize(
    ("value", "factor", "message"), [("loftq", 1, "works on a quantised base weight"), ("pissa", 0, "has scaling 0")]
)
def test_what_cannot_be_combined_is_refused(value: str, factor: float, message: str) -> None:
    model = adapt(value)
    model.set_scale("default", factor)
    with pytest.raises(ValueError, match=f"adapter 'default' {message}"):
        model.add_weighted_adapter(["default"], [1.0], "new", "cat")
    assert list(model.peft_config) == ["default"]


# -- saved and loaded --------------------------------------------------------------------------


def peft_on_original(folder: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(Net(), folder)(X).detach()


@pytest.mark.parametrize("value", CHANGING)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down": 2}},
        {"use_rslora": True, "rank_pattern": {"^down": 2}, "alpha_pattern": {"up": 3, "down": 5}},
    ],
    ids=str,
)
def test_a_saved_adapter_loads_on_the_original_base_here_and_in_peft(
    value: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapt(value, **options)
    said = copy.deepcopy(model.peft_config["default"])
    train(model)
    wanted = model(X).detach()
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="not_needed")
    assert model.peft_config["default"] == said and torch.equal(model(X), wanted)
    here = PeftModel.from_pretrained(Net(), tmp_path)
    agree([here(X), peft_on_original(tmp_path)], [wanted, wanted])
    with here.disable_adapter():
        agree(here(X), Net()(X))
    agree(here.unload()(X), Net()(X))
    layer, loaded = model.lora_layers()["down"], here
    written = LoraConfig.from_pretrained(tmp_path)
    assert written.init_lora_weights is True
    assert (written.loftq_config, written.corda_config, written.lora_ga_config) == (None, None, None)
    if value != "loftq":
        assert written.r == 2 * said.r and written.rank_pattern == {k: 2 * v for k, v in said.rank_pattern.items()}
        assert loaded.peft_config["default"].r == 8 and layer.r["default"] == said.rank_pattern.get(
            "down", layer.r["default"]
        )


@pytest.mark.parametrize("value", CHANGING)
def test_reloaded_twice_it_is_still_the_same(value: str, tmp_path: Path) -> None:
    model = adapt(value)
    train(model)
    model.save_pretrained(tmp_path / "1")
    once = PeftModel.from_pretrained(Net(), tmp_path / "1", is_trainable=True)
    once.save_pretrained(tmp_path / "2")
    agree(PeftModel.from_pretrained(Net(), tmp_path / "2")(X), model(X))


@pytest.mark.parametrize("value", ["pissa", "olora"])
def test_unconverted_is_a_choice_and_loads_where_the_weight_decides(value: str, tmp_path: Path) -> None:
    model = adapt(value)
    train(model)
    model.save_pretrained(tmp_path, convert=False)
    assert LoraConfig.from_pretrained(tmp_path).init_lora_weights == value
    agree(PeftModel.from_pretrained(Net(), tmp_path)(X), model(X))
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16))
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=value)
    )
    theirs.base_model.model[0].lora_B["default"].weight.data += 0.1
    theirs.save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    # Both decompose W in float32, with 8 roots of m n of its roundings, not all in one direction (Higham and Mary,
    # 2019, doi 10.1137/18M1226312). What they take out turns by one over the gap, or by the leading columns' condition.
    W = base[0].weight.detach().double()
    S, leading = torch.linalg.svdvals(W), torch.linalg.svdvals(W[:, :4])
    turned = (S[0] / (S[3] - S[4] if value == "pissa" else leading[-1])).item()
    terms, size = 8 * W.numel() ** 0.5 * (1 + 2 * turned), X.norm(dim=1, keepdim=True) * S[0]
    close(ours.double()(X), theirs.double()(X), terms, size, torch.float32, what="a folder of PEFT, not converted")


@pytest.mark.parametrize("value", ["pissa_niter_2", "corda", "lora_ga", "loftq"])
def test_unconverted_is_refused_where_the_weight_does_not_decide(value: str, tmp_path: Path) -> None:
    adapt(value).save_pretrained(tmp_path, convert=False)
    net = Net()
    before = weights(net)
    with pytest.raises(ValueError, match=f"init_lora_weights='{value}' and not converted"):
        PeftModel.from_pretrained(net, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda W: W.to(torch.int8), "torch.int8"),
        (lambda W: W[1:].clone(), r"shape \(15, 12\)"),
        (lambda W: W + 1e300, "not finite in torch.float32"),
    ],
    ids=["int8", "shape", "too large"],
)
def test_a_base_weight_in_a_folder_must_fit(change: Callable[[Tensor], Tensor], message: str, tmp_path: Path) -> None:
    adapt("loftq").save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    key = "base_model.model.up.base_layer.weight"
    safetensors.torch.save_file(tensors | {key: change(tensors[key])}, file)
    net = Net(torch.float32)
    before = weights(net)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(net, tmp_path)
    assert isinstance(net.up, nn.Linear) and all(torch.equal(p, before[n]) for n, p in net.named_parameters())


@pytest.mark.parametrize("value", CHANGING)
def test_a_folder_does_not_know_of_set_scale_or_of_other_adapters(value: str, tmp_path: Path) -> None:
    model = adapt(value)
    add(model, "second", "olora", use_rslora=True)
    train(model), train(model, "second")
    wanted = [explicit(model, name) for name in ("default", "second")]
    model.set_scale("default", -3)
    model.merge_adapter(["second"])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    for name, y in zip(("default", "second"), wanted, strict=True):
        loaded.set_adapter(name)
        agree(loaded(X), y)
    if value == "loftq":
        return  # PEFT leaves the quantised weight to all adapters
    theirs = peft.PeftModel.from_pretrained(Net(), tmp_path)
    theirs.load_adapter(str(tmp_path / "second"), "second")
    theirs.set_adapter("second")
    agree(theirs(X), wanted[1])


def seeded_llama(tied: bool) -> nn.Module:
    torch.manual_seed(0)
    return llama(num_hidden_layers=1, tie_word_embeddings=tied).eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("value", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("embeddings", ["auto", False])
def test_the_head_of_a_language_model_is_saved_with_its_weight(
    value: str, tied: bool, embeddings: bool | str, tmp_path: Path
) -> None:
    """PEFT puts the base weight of a targeted lm_head into the file: the original one, or LoftQ's."""
    tokens = torch.tensor([[1, 2, 3, 4]])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*its weight is tied")
        model = get_peft_model(seeded_llama(tied), config(value, target_modules=["lm_head", "q_proj"]))
        train(model)
        wanted, original = model(tokens).logits, seeded_llama(tied)(tokens).logits
        model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
        loaded = PeftModel.from_pretrained(seeded_llama(tied), tmp_path)
    agree(loaded(tokens).logits, wanted)
    with loaded.disable_adapter():
        agree(loaded(tokens).logits, original)
    if value != "loftq" or not tied:  # there PEFT gives LoftQ's weight to the input embedding, too
        theirs = peft.PeftModel.from_pretrained(seeded_llama(tied), tmp_path)
        agree(theirs(tokens).logits, wanted)


def test_a_head_that_is_merged_is_saved_with_the_weight_before(tmp_path: Path) -> None:
    model = get_peft_model(seeded_llama(False), config(False, target_modules=["lm_head"]))
    for folder in ("plain", "merged"):
        model.save_pretrained(tmp_path / folder, save_embedding_layers=True)
        model.merge_adapter()
    plain, merged = (
        safetensors.torch.load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("plain", "merged")
    )
    assert "base_model.model.lm_head.base_layer.weight" in plain
    assert plain.keys() == merged.keys() and all(torch.equal(merged[key], plain[key]) for key in plain)


@pytest.mark.parametrize("value", ["pissa", "olora"])
def test_the_head_unconverted_is_what_peft_writes(value: str, tmp_path: Path) -> None:
    model = get_peft_model(seeded_llama(False).float(), config(value, target_modules=["lm_head"]))
    train(model)
    model.save_pretrained(tmp_path, convert=False)
    tokens = torch.tensor([[1, 2, 3, 4]])
    theirs = peft.PeftModel.from_pretrained(seeded_llama(False).float(), tmp_path)  # which decomposes no float64
    # the file has W - D0, rounded to float32
    got, wanted = theirs(tokens).logits, model.double()(tokens).logits
    assert nearest(got, wanted, seeded_llama(False)(tokens).logits)
    with pytest.raises(ValueError, match=r"lm_head.*is a base weight from which an adapter subtracts its initial"):
        PeftModel.from_pretrained(seeded_llama(False), tmp_path)


# -- what else is done with models -------------------------------------------------------------


def two_of(first: str = "pissa", second: str = "loftq") -> PeftModel:
    model = adapt(first)
    add(model, "second", second)
    train(model), train(model, "second", seed=2)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_what_was_taken_moves_with_the_model(dtype: torch.dtype, merged: bool) -> None:
    model = two_of()
    if merged:
        model.merge_adapter()
    wanted = [explicit(model, "default"), explicit(model, "default", "second")]
    model.to(dtype)
    assert {t.dtype for t in model.state_dict().values()} == {dtype}
    assert nearest(model(X.to(dtype)), wanted[0], wanted[1])
    with model.disable_adapter():
        y = model(X.to(dtype))
        assert y.dtype == dtype and nearest(y, Net()(X), wanted[0])
    if merged:
        model.unmerge_adapter()
    model.set_adapter(["default", "second"])
    assert nearest(model(X.to(dtype)), wanted[1], wanted[0])
    plain = model.unload()
    assert {p.dtype for p in plain.parameters()} == {dtype} and nearest(plain(X.to(dtype)), Net()(X), wanted[0])


def test_a_weight_put_aside_may_lie_on_another_device() -> None:
    model = two_of()
    model.merge_adapter()
    model.to("meta")  # not the unmerged weight, which is no parameter of the model
    model.delete_adapter("second")
    model.unmerge_adapter()
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_is_merged_and_knows_what_was_taken(how: Callable[[PeftModel], PeftModel]) -> None:
    model = two_of()
    model.merge_adapter()
    twin = how(model)
    assert torch.equal(twin(X), model(X))
    for each in (model, twin):
        each.delete_adapter("second")
        each.unmerge_adapter()
    assert torch.equal(twin(X), model(X))
    agree(twin(X), explicit(model, "default"))


@pytest.mark.parametrize("active", ["default", "second"])
def test_gradients_are_those_of_the_weights_written_out(active: str) -> None:
    """And the same through gradient checkpointing."""
    model = two_of("pissa", "olora")
    model.set_adapter(active)
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    net, z = Net(), X.clone().requires_grad_()
    for name in ("up", "down"):
        layer = getattr(net, name)
        D = update(model, active, name, layer.weight)
        layer.weight.data += D if name == "up" else D.T
    net(z).square().sum().backward()
    agree(x.grad, z.grad)
    for name, layer in model.lora_layers().items():
        A, B = layer.factors(active)
        G = getattr(net, name).weight.grad if name == "up" else net.down.weight.grad.T
        agree(A.grad, layer.scaling[active] * B.T @ G)
        agree(B.grad, layer.scaling[active] * G @ A.T)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(wanted) == 4 and all(f".{active}." in n for n in wanted)
    for reentrant in (True, False):
        model.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        assert all(torch.equal(dict(model.named_parameters())[n].grad, g) for n, g in wanted.items())


@pytest.mark.parametrize("active", ["default", "second"])
def test_it_compiles_without_a_break(active: str) -> None:
    model = two_of()
    model.set_adapter(active)
    wanted = model(X)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    agree(compiled(X), wanted)
    with model.disable_adapter():
        agree(compiled(X), Net()(X))
    agree(compiled(X), wanted)


@pytest.mark.parametrize("names", [[], ["default"], ["second"], ["default", "second"]], ids=str)
def test_under_autocast_what_was_taken_is_there_to_half_precision(names: list[str]) -> None:
    model = two_of("pissa", "olora").float()
    model.set_adapter(names)
    wanted = model(X.float())
    model.set_adapter(["second"] if names == ["default"] else ["default"])
    other = model(X.float())
    model.set_adapter(names)
    with torch.autocast("cpu", torch.bfloat16):
        assert nearest(model(X.float()), wanted, other, TIMES[torch.bfloat16])


@pytest.mark.parametrize("value", LOW_RANK)
def test_no_second_copy_of_the_weight_stays(value: str) -> None:
    net = Net()
    originals = [net.up.weight, net.down.weight]
    model = adapt(value, net)
    assert all(layer.base_weight is W for layer, W in zip(model.lora_layers().values(), originals, strict=True))
    tensors = model.state_dict(keep_vars=True)
    assert sum(t.shape in ((12, 16), (16, 12)) for t in tensors.values()) == 1
    for name, t in tensors.items():
        assert t.untyped_storage().nbytes() == t.numel() * t.element_size(), f"{name} is a view of something larger"
    assert not any(vars(layer.get_base_layer()).get("prepared_init") for layer in model.lora_layers().values())


def test_a_module_held_at_two_places_is_adapted_once() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 6).double()
    net = nn.Sequential(linear, nn.Tanh(), nn.Sequential(linear))
    x = X[:, :6]
    wanted = net(x).detach()
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    assert net[0] is net[2][0]
    agree(model(x), wanted)
    model.lora_layers()["0"].factors("default")[1].data += 1
    assert distance(model(x), wanted) > 0.01
    with model.disable_adapter():
        agree(model(x), wanted)
    assert model.unload() is net and net[0] is net[2][0] is linear
    agree(net(x), wanted)


@pytest.mark.parametrize("value", CHANGING)
def test_beside_biases_and_modules_saved_whole(value: str, tmp_path: Path) -> None:
    model = adapt(value, modules_to_save=["head"], bias="all")
    train(model)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_" not in name:
            p.data += 0.1
    wanted = model(X).detach()
    model.save_pretrained(tmp_path)
    agree(PeftModel.from_pretrained(Net(), tmp_path)(X), wanted)
    agree(peft_on_original(tmp_path), wanted)
    agree(model.merge_and_unload()(X), wanted)


def test_the_same_parameters_train_after_every_operation() -> None:
    model = adapt("pissa")

    def trained() -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    wanted = {f"base_model.model.{m}.lora_{f}.default.weight" for m in ("up", "down") for f in "AB"}
    add(model, "second", "olora")
    assert trained() == wanted
    model.merge_adapter()
    assert trained() == wanted
    with model.disable_adapter():
        model.delete_adapter("second")
    assert trained() == wanted
    model.unmerge_adapter()
    assert trained() == wanted
    assert not any(p.requires_grad for p in model.unload().parameters())


# -- refused -----------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv, self.fc = nn.Embedding(20, 8), nn.Conv1d(8, 8, 3), nn.Linear(8, 6)


@pytest.mark.parametrize("value", CHANGING)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["words"]}, "words: .*not available for embedding layers"),
        ({"target_modules": ["conv"]}, "conv: .*not available for conv layers"),
        ({"target_parameters": ["fc.weight"], "target_modules": []}, "fc.weight: .*not available for parameter layers"),
        ({"target_modules": ["fc"], "r": 7}, r"fc: .*r <= min\(in, out\) = 6, r=7"),
        ({"target_modules": ["fc"], "rank_pattern": {"fc": 9}}, r"fc: .*r=9"),
        ({"target_modules": ["fc"], "lora_alpha": 0}, "fc: .*lora_alpha must be > 0"),
        ({"target_modules": ["fc"], "alpha_pattern": {"fc": -1}}, "fc: .*lora_alpha must be > 0"),
    ],
    ids=str,
)
def test_what_a_method_does_not_support_is_refused_by_name(value: str, options: dict[str, Any], message: str) -> None:
    net = Odd()
    before = weights(net)
    with pytest.raises(ValueError, match=message):
        get_peft_model(net, config(value, **options))
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())
    assert [type(m) for m in net.children()] == [nn.Embedding, nn.Conv1d, nn.Linear]


@pytest.mark.parametrize("value", ["corda", "lora_ga"])
def test_without_its_data_it_says_what_to_call(value: str) -> None:
    with pytest.raises(ValueError, match=f"up: .*call {init.METHODS[value].prepare} on the model first"):
        get_peft_model(Net(), config(value))


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_2", "olora", "loftq", "mica"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_weight_is_refused_and_the_others_come_back(value: str, bad: float) -> None:
    net = Net()
    net.down.weight.data[1, 2] = bad
    up = net.up.weight
    with pytest.raises(ValueError, match="down: "):
        adapt(value, net)
    assert net.up.weight is up and torch.equal(up, Net().up.weight) and isinstance(net.down, Conv1D)


@pytest.mark.parametrize("value", CHANGING)
def test_an_adapter_may_start_while_another_one_is_merged(value: str) -> None:
    """It starts from the unmerged weight."""
    model = adapt(True)
    train(model)
    model.merge_adapter()
    add(model, "second", value)
    for layer, first in zip(model.lora_layers().values(), adapt(value).lora_layers().values(), strict=True):
        for factor, wanted in zip(layer.factors("second"), first.factors("default"), strict=True):
            agree(factor, wanted)
    agree(model(X), explicit(model, "default"))
    model.unmerge_adapter()
    model.set_adapter("second")
    agree(model(X), explicit(model, "second"))


def test_a_model_without_numbers_is_refused() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"0: .*meta device"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))


def test_tied_weights_are_warned_of() -> None:
    net = nn.Module()
    net.embed, net.head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    net.head.weight = net.embed.weight
    before = net.embed.weight.detach().clone()
    with pytest.warns(UserWarning, match="merging it ends the tie"):
        model = get_peft_model(net, LoraConfig(r=2, target_modules=["head"], init_lora_weights="pissa"))
    assert model.lora_layers()["head"].base_weight is net.embed.weight and torch.equal(net.embed.weight, before)
    train(model)
    model.merge_adapter()
    assert model.lora_layers()["head"].base_weight is not net.embed.weight and torch.equal(net.embed.weight, before)


# -- mica --------------------------------------------------------------------------------------


def test_mica_trains_a_alone_through_every_switch(tmp_path: Path) -> None:
    model = adapt("mica")
    assert torch.equal(model(X), Net()(X)), "a no-op at the start"

    def trained() -> set[str]:
        return {n.split(".")[-3] for n, p in model.named_parameters() if p.requires_grad}

    assert trained() == {"lora_A"}
    with model.disable_adapter():
        assert torch.equal(model(X), Net()(X))
    assert trained() == {"lora_A"}
    add(model, "other", True)
    model.set_adapter("other")
    assert trained() == {"lora_A", "lora_B"}
    model.set_adapter("default")
    assert trained() == {"lora_A"}
    train(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    model = PeftModel.from_pretrained(Net(torch.float32), tmp_path, is_trainable=True)
    theirs = peft.PeftModel.from_pretrained(Net(torch.float32), tmp_path)  # which refuses a float64 base
    assert trained() == {"lora_A"}
    agree(theirs.double()(X), model.double()(X))


@given(value=st.sampled_from(["pissa", "olora"]), r=st.integers(1, 10), alpha=st.floats(0.1, 100), rslora=st.booleans())
def test_any_rank_and_scaling(value: str, r: int, alpha: float, rslora: bool) -> None:
    model = adapt(value, r=r, lora_alpha=alpha, use_rslora=rslora)
    agree(model(X), Net()(X))
    train(model)
    agree(model(X), explicit(model, "default"))
    with model.disable_adapter():
        agree(model(X), Net()(X))
