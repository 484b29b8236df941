"""What an adapted model computes: lora_ref and the installed PEFT (and loralib) agree, weight by weight.

The weights of one library's adapted model are loaded into the other's by `state_dict`, so names and
shapes agree too. Models are in float64 wherever the dtype is not what is tested: then `agree`
leaves no room for a wrong formula.
"""

import copy
import warnings
from typing import Any

import loralib
import peft
import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from models import UpAndDown, randomise
from peft.tuners.lora import LoraLayer as PeftLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lora_ref
from spec_tests import agree, close, distance
from spec_tests.rounding import unit

# PEFT's remarks on fan_in_fan_out, on trained biases, on names without a match
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(nn.Module):
    """The layer under test, then a norm and a head so that there are biases that nothing targets."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.norm, self.head = layer, nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y = y.movedim(1, -1) if isinstance(x, Tensor) and self.channels_first else y
        return self.head(self.norm(y))

    channels_first = False


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    n = draw(st.sampled_from([1, 2, 3]))
    stride = draw(st.integers(1, 2))
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1](
        4,
        6,
        kernel_size=draw(st.integers(1, 3)),
        stride=stride,
        padding=draw(st.sampled_from([0, 1, "valid"] + ["same"] * (stride == 1))),
        groups=draw(st.sampled_from([1, 1, 2])),
        bias=draw(st.booleans()),
    )
    return conv, torch.randn(2, 4, *(7, 6, 5)[:n])


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A layer of any kind, and an input for it."""
    torch.manual_seed(draw(st.integers(0, 9)))
    kind = draw(st.sampled_from(["linear", "conv1d of transformers", "embedding", "conv", "conv"]))
    event(kind)
    n_in, n_out = draw(st.sampled_from([(5, 5), (4, 7), (7, 3)]))
    if kind == "linear":
        return nn.Linear(n_in, n_out, bias=draw(st.booleans())), torch.randn(2, 3, n_in)
    if kind == "embedding":
        padding = draw(st.sampled_from([None, 0, 2]))
        by_frequency = draw(st.booleans())
        tokens = torch.tensor([[0, 2, 1], [2, 2, 0]])
        return nn.Embedding(n_in, n_out, padding_idx=padding, scale_grad_by_freq=by_frequency), tokens
    return draw(convolutions()) if kind == "conv" else (Conv1D(n_out, n_in), torch.randn(2, 3, n_in))


@st.composite
def options(draw: st.DrawFn, groups: int = 1) -> dict[str, Any]:
    """Whatever may be asked of a layer."""
    return {
        "r": groups * draw(st.integers(1, 5)),
        "lora_alpha": draw(st.sampled_from([1, 8, 3.5, -2, 0])),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
    }


def wrap(model: nn.Module, adapter_name: str = "default", **options: Any) -> tuple[Any, Any]:
    """The same model adapted by PEFT and by lora_ref."""
    return tuple(
        library.get_peft_model(copy.deepcopy(model), library.LoraConfig(**copy.deepcopy(options)), adapter_name)
        for library in (peft, lora_ref)
    )


def trained(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}


def assert_same_structure(theirs: Any, ours: Any) -> None:
    """Same trainable names and counts, same state_dict, same scaling."""
    assert trained(ours) == trained(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    shapes = [{name: (t.shape, t.dtype) for name, t in model.state_dict().items()} for model in (theirs, ours)]
    assert shapes[1] == shapes[0]
    scalings = [
        {name: m.scaling for name, m in model.named_modules() if isinstance(m, layer)}
        for model, layer in ((theirs, PeftLayer), (ours, lora_ref.LoraLayer))
    ]
    assert scalings[1] == scalings[0]


def assert_same_outputs(theirs: Any, ours: Any, *args: Any, **kwargs: Any) -> None:
    agree(ours(*args, **kwargs), theirs(*args, **kwargs))


def assert_same_gradients(theirs: Any, ours: Any, x: Tensor) -> None:
    gradients = []
    for model in (theirs, ours):
        model.zero_grad()
        x = x.detach().clone().requires_grad_(x.is_floating_point())
        model(x).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if x.is_floating_point():
            gradients[-1]["the input"] = x.grad
    agree(gradients[1], gradients[0])


def assert_same(theirs: Any, ours: Any, x: Tensor, mergeable: bool = True) -> None:
    """All that two adapted models do, on equal weights."""
    assert_same_structure(theirs, ours)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert_same_outputs(theirs, ours, x)
    assert_same_gradients(theirs, ours, x)
    with theirs.disable_adapter(), ours.disable_adapter():
        assert_same_outputs(theirs, ours, x)
    assert_same_outputs(theirs, ours, x)
    if mergeable:
        theirs.merge_adapter(), ours.merge_adapter()
        assert_same_outputs(theirs, ours, x)
        with theirs.disable_adapter(), ours.disable_adapter():
            assert_same_outputs(theirs, ours, x)
        theirs, ours = theirs.merge_and_unload(), ours.merge_and_unload()
        agree(ours.state_dict(), theirs.state_dict())


@given(st.data(), layers())
def test_a_layer_of_any_kind_does_the_same(data: st.DataObject, layer_and_x: tuple[nn.Module, Tensor]) -> None:
    layer, x = layer_and_x
    groups = getattr(layer, "groups", 1)
    is_conv = hasattr(layer, "kernel_size")
    # for the latter see test_a_conv3d_with_kernel_1_merges_where_peft_fails
    mergeable = groups == 1 and getattr(layer, "kernel_size", None) != (1, 1, 1)
    model = Net(layer, 6 if is_conv else layer(x).shape[-1]).double()
    model.channels_first = is_conv
    x = x.double() if x.is_floating_point() else x
    asked = data.draw(options(groups))
    theirs, ours = wrap(model, target_modules=["layer"], **asked)
    for name, tensor in theirs.state_dict().items():
        if "lora_" in name:
            assert bool(ours.state_dict()[name].any()) == bool(tensor.any()), name
    assert_same(theirs, ours, x, mergeable)


@given(options(), st.sampled_from([0, 2, 3]), st.booleans(), st.sampled_from([["up"], ["down"], ["up", "down"]]))
def test_raw_parameters_do_the_same(asked: dict[str, Any], n: int, is_transposed: bool, which: list[str]) -> None:
    model = Net(UpAndDown(n, 4, 6, is_transposed), 4).double()
    theirs, ours = wrap(model, target_parameters=[f"layer.{name}" for name in which], **asked)
    assert_same(theirs, ours, torch.randn(5, 4).double())


def test_the_weight_of_a_layer_can_be_a_raw_parameter() -> None:
    theirs, ours = wrap(
        Net(nn.Linear(4, 4), 4).double(), target_parameters=["layer.weight"], r=3, target_modules=["head"]
    )
    assert_same(theirs, ours, torch.randn(5, 4).double())


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), lambda: Conv1D(5, 6), lambda: nn.Embedding(6, 5)])
def test_every_dtype_does_the_same(make: Any, dtype: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    layer, r = make().to(dtype), 3
    x = torch.tensor([[1, 5, 2]]) if isinstance(layer, nn.Embedding) else torch.randn(4, 6).to(dtype)
    model = nn.Sequential(layer)
    theirs, ours = (
        library.get_peft_model(
            copy.deepcopy(model), library.LoraConfig(r=r, target_modules=["0"]), autocast_adapter_dtype=autocast
        )
        for library in (peft, lora_ref)
    )
    assert_same_structure(theirs, ours)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    adapted = ours.base_model.model[0]
    A, B = (f.detach().double().abs() for f in adapted.factors("default"))
    s, wide = adapted.scaling["default"], torch.promote_types(dtype, torch.float32)

    # The base's output has the same bits in both. Added to it is the branch, whose sums of n and r products, with
    # a product and two additions, are in the factors' dtype. Then the output is rounded once.
    base, n = layer(x), 1 if isinstance(layer, nn.Embedding) else 6
    inputs = nn.functional.one_hot(x, 6).double() if isinstance(layer, nn.Embedding) else x.double().abs()
    branch = (n + r + 3) * unit(adapted.factors("default")[0]) / unit(dtype)
    got, want = ours(x), theirs(x)
    assert got.dtype == want.dtype == dtype
    close(got, want, terms=1 + branch, size=base.detach().double().abs() + s * inputs @ A.T @ B.T)

    # Ours rounds W + s B A to W's dtype once, PEFT rounds s B A too. The sum of r products, the product by s and the
    # addition are in float32 at least.
    W = layer.weight.detach().double().abs()
    theirs.merge_adapter(), ours.merge_adapter()
    merged = [m.base_model.model[0].get_base_layer().weight for m in (ours, theirs)]
    assert merged[0].dtype == dtype
    close(*merged, terms=2 + (r + 2) * unit(wide) / unit(dtype), size=W + adapted.stored(s * B @ A))


def chain(width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 7), nn.Linear(7, 3)).double()


def two_adapters(**of_second: Any) -> tuple[Any, Any]:
    """ "a" on layers 0 and 2 with the head saved, "b" as asked, in both libraries, with equal weights."""
    theirs, ours = wrap(chain(), "a", r=2, lora_alpha=6, target_modules=["0", "2"], modules_to_save=["3"])
    theirs.add_adapter("b", peft.LoraConfig(**of_second))
    ours.add_adapter("b", lora_ref.LoraConfig(**of_second))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


SECOND = [
    {"r": 3, "target_modules": ["2"], "modules_to_save": ["3"]},
    {"r": 4, "target_modules": ["0"], "use_rslora": True, "modules_to_save": ["3"]},
    {"r": 2, "target_modules": ["2"]},
]


@pytest.mark.parametrize("second", SECOND, ids=str)
def test_two_adapters_switch_alike(second: dict[str, Any]) -> None:
    theirs, ours = two_adapters(**second)
    x = torch.randn(5, 6).double()
    for name in ("a", "b", "a"):
        theirs.set_adapter(name), ours.set_adapter(name)
        assert ours.active_adapter == name and trained(ours) == trained(theirs)
        assert_same_outputs(theirs, ours, x)
        assert_same_gradients(theirs, ours, x)
    theirs.delete_adapter("a"), ours.delete_adapter("a")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.set_adapter("b"), ours.set_adapter("b")
    assert_same_outputs(theirs, ours, x)


def test_several_active_adapters_add() -> None:
    theirs, ours = two_adapters(r=3, target_modules=["2"])
    theirs.base_model.set_adapter(["a", "b"]), ours.base_model.set_adapter(["a", "b"])
    assert trained(ours) == trained(theirs)
    assert_same(theirs, ours, torch.randn(5, 6).double())


@given(st.lists(st.sampled_from(["a", "b", "__base__"]), min_size=1, max_size=6), st.sampled_from(SECOND[:2]))
def test_a_batch_may_mix_adapters(names: list[str], second: dict[str, Any]) -> None:
    theirs, ours = (model.eval() for model in two_adapters(**second))
    x = torch.randn(len(names), 6).double()
    assert_same_outputs(theirs, ours, x, adapter_names=names)
    for i, name in enumerate(names):
        if name != "__base__":
            ours.set_adapter(name)
            agree(ours(x, adapter_names=names)[i], ours(x)[i])


@given(
    st.sampled_from(["cat", "linear", "svd"]),
    st.lists(st.sampled_from([1.0, 0.5, -0.5, 2.0, 0.3]), min_size=2, max_size=2),
    st.sampled_from([None, 1, 3]),
)
def test_weighted_sums_of_adapters_are_the_same(kind: str, weights: list[float], svd_rank: int | None) -> None:
    r, alpha = 3, 6
    theirs, ours = wrap(chain(), "a", r=r, lora_alpha=alpha, target_modules=["0", "2"])
    theirs.add_adapter("b", peft.LoraConfig(r=r, lora_alpha=1, target_modules=["2", "3"]))
    ours.add_adapter("b", lora_ref.LoraConfig(r=r, lora_alpha=1, target_modules=["2", "3"]))
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    torch.set_default_dtype(torch.float64)  # PEFT makes tensors of the weights and their roots
    try:
        theirs.base_model.add_weighted_adapter(["a", "b"], weights, "c", combination_type=kind, svd_rank=svd_rank)
    finally:
        torch.set_default_dtype(torch.float32)
    ours.add_weighted_adapter(["a", "b"], weights, "c", combination_type=kind, svd_rank=svd_rank)
    for name in ("a", "c"):
        theirs.set_adapter(name), ours.set_adapter(name)
        for i in (0, 2, 3):
            if name in ours.base_model.model[i].adapters():
                agree(ours.base_model.model[i].delta(name), theirs.base_model.model[i].get_delta_weight(name))


@pytest.mark.usefixtures("masks_of_torch")
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_acts_on_the_same_input(p: float) -> None:
    theirs, ours = wrap(chain(), r=3, target_modules=["0", "2", "3"], lora_dropout=p)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 6).double()
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(1)
        outputs += [model.train()(x), model.eval()(x)]
    agree(outputs[2:], outputs[:2])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval (loralib merges)"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv"])
def test_loralib_computes_the_same(kind: str, train: bool) -> None:
    """A convolution with kernel 1: with a larger one loralib factorises another matrix, (out*k, in*k)."""
    torch.manual_seed(0)
    base, theirs = {
        "linear": lambda: (nn.Linear(6, 5), loralib.Linear(6, 5, r=3, lora_alpha=7)),
        "embedding": lambda: (nn.Embedding(6, 5), loralib.Embedding(6, 5, r=3, lora_alpha=7)),
        "conv": lambda: (nn.Conv2d(6, 5, 1), loralib.Conv2d(6, 5, 1, r=3, lora_alpha=7)),
    }[kind]()
    base, theirs = base.double(), theirs.double()
    shape = {"linear": (4, 6), "conv": (2, 6, 3, 3)}
    x = torch.tensor([0, 5, 2]) if kind == "embedding" else torch.randn(shape[kind]).double()
    own = theirs.conv if kind == "conv" else theirs
    own.load_state_dict(base.state_dict(), strict=False)
    A, B = nn.init.normal_(theirs.lora_A), nn.init.normal_(theirs.lora_B)
    ours = lora_ref.get_peft_model(nn.Sequential(base), lora_ref.LoraConfig(r=3, lora_alpha=7, target_modules=["0"]))
    factors = [p for name, p in ours.named_parameters() if "lora_" in name]
    for factor, value in zip(factors, (A, B), strict=True):
        factor.data = value.data.reshape(factor.shape)
    theirs.train(train)  # returns None
    agree(ours.train(train)(x), theirs(x))


# -- differences, each on purpose ----------------------------------------------------------------


def test_biases_train_whenever_their_adapter_is_active_where_peft_leaves_those_of_a_later_adapter_frozen() -> None:
    """PEFT's documents say of `bias` that these biases "will be updated during training"."""
    theirs, ours = two_adapters(r=2, target_modules=["2"], bias="lora_only")
    for name in ("b", "a", "b"):
        theirs.set_adapter(name), ours.set_adapter(name)
        extra = ["base_model.model.2.base_layer.bias"] if name == "b" else []
        assert sorted(trained(ours)) == sorted([*trained(theirs), *extra])


def test_leaving_disable_adapter_restores_what_trained_where_peft_loses_it_with_several_active() -> None:
    theirs, ours = two_adapters(r=3, target_modules=["2"])
    for model in (theirs, ours):
        model.base_model.set_adapter(["a", "b"])
    before = trained(ours)
    assert before == trained(theirs)
    with theirs.disable_adapter(), ours.disable_adapter():
        pass
    assert trained(ours) == before


def test_a_mixed_batch_may_name_an_adapter_that_saves_no_module_where_peft_raises_a_key_error() -> None:
    theirs, ours = (model.eval() for model in two_adapters(r=3, target_modules=["2"]))
    x = torch.randn(2, 6).double()
    got = ours(x, adapter_names=["a", "b"])
    with pytest.raises(KeyError):
        copy.deepcopy(theirs)(x, adapter_names=["a", "b"])
    for i, name in enumerate(("a", "b")):
        theirs.set_adapter(name)
        agree(got[i], theirs(x)[i])


def test_svd_rank_may_exceed_the_size_of_a_layer_where_peft_writes_factors_that_do_not_fit() -> None:
    theirs, ours = wrap(chain(), "a", r=2, target_modules=["3"])
    theirs.add_adapter("b", peft.LoraConfig(r=2, target_modules=["3"]))
    ours.add_adapter("b", lora_ref.LoraConfig(r=2, target_modules=["3"]))
    randomise(ours)
    for model in (theirs, ours):
        model.base_model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="svd", svd_rank=5)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        theirs.base_model.model[3].get_delta_weight("c")
    layer = ours.base_model.model[3]
    agree(layer.delta("c"), layer.delta("a") + layer.delta("b"))


def test_a_grouped_convolution_is_not_merged_where_peft_fails_halfway_or_merges_wrongly() -> None:
    theirs, ours = wrap(nn.Sequential(nn.Conv1d(4, 6, 1, groups=2)).double(), r=2, target_modules=["0"])
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5).double()
    before = ours(x)
    with pytest.raises(ValueError, match=r"0: .*groups=2 cannot be merged"):
        ours.merge_adapter()
    assert torch.equal(ours(x), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs.merge_adapter()
        except Exception:
            return
    assert distance(theirs(x), before) > 0.01


@pytest.mark.parametrize("like", [{"dilation": 2}, {"padding_mode": "circular"}, {"padding_mode": "reflect"}], ids=str)
def test_a_convolution_keeps_dilation_and_padding_mode_where_peft_drops_them(like: dict[str, Any]) -> None:
    """PEFT's branch is an undilated convolution with zero padding, so its outputs before and after merging differ."""
    theirs, ours = wrap(Net(nn.Conv1d(4, 6, 3, padding=2, **like), 6).double(), r=2, target_modules=["layer"])
    x = torch.randn(2, 4, 7).double()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        model.base_model.model.channels_first = True
    unmerged = ours(x)
    try:
        apart = distance(theirs(x), unmerged)
    except RuntimeError:  # the branch has another size
        apart = 1.0
    assert apart > 0.01
    theirs.merge_adapter(), ours.merge_adapter()
    agree(ours(x), unmerged)
    agree(theirs(x), unmerged)


def test_a_conv3d_with_kernel_1_merges_where_peft_fails() -> None:
    """PEFT takes it for a Conv2d with kernel 1, whose update is computed by a matrix product."""
    theirs, ours = wrap(nn.Sequential(nn.Conv3d(4, 6, 1)).double(), r=2, target_modules=["0"])
    randomise(ours)
    x = torch.randn(2, 4, 3, 3, 3).double()
    unmerged = ours(x)
    ours.merge_adapter()
    agree(ours(x), unmerged)
    with pytest.raises(RuntimeError):
        theirs.merge_adapter()


def test_a_single_transposed_expert_works_where_peft_adds_an_update_of_the_wrong_shape() -> None:
    theirs, ours = wrap(Net(UpAndDown(1, 4, 6, is_transposed=True), 4).double(), target_parameters=["layer.up"])
    assert_same_structure(theirs, ours)
    randomise(ours)
    x = torch.randn(5, 4).double()
    with pytest.raises(RuntimeError, match="must match the size"):
        theirs(x)
    unmerged = ours(x)
    agree(ours.merge_and_unload()(x), unmerged)
