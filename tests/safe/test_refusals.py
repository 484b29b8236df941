"""What is refused or warned about before a model changes, and in which words."""

import re
import warnings
from collections import OrderedDict

import pytest
import torch
from models import Twice, adapt
from torch import Tensor, nn

from lora_ref import LoftQConfig, LoraConfig, explain, get_peft_model
from lora_ref.core.inits import METHODS
from lora_ref.core.names import ModelNames, resolve
from lora_ref.safe.refusals import unused_rules

NAMES = ModelNames(
    {
        "model": "",
        "model.layers.0.attn.q_proj": "linear",
        "model.layers.0.attn.xq_proj": "linear",
        "model.conv": "conv",
    }
)


def notes(**options: object) -> list[str]:
    config = LoraConfig(**options)
    return unused_rules(resolve(NAMES, config), config)


# -- nothing matches -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_modules": []}, "nothing to adapt: target_modules=[], target_parameters=None match none of"),
        ({"target_modules": ["qproj"]}, "near names: q_proj, xq_proj"),
        ({"target_modules": ["conv"], "exclude_modules": ["conv"]}, "model.conv: exclude_modules 'conv'"),
        (
            {"target_modules": ["conv"], "layers_to_transform": [3]},
            "model.conv: target_modules 'conv', but not in a numbered layer",
        ),
        ({"target_modules": "q_proj"}, "a string is a regular expression for the WHOLE name"),
        ({"target_modules": [], "target_parameters": ["qproj"]}, "near names: q_proj, xq_proj"),
    ],
)
def test_nothing_matched_says_what_removed_what_and_names_near_ones(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        notes(**options)


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"target_modules": ["q_proj", "k_proj"]}, "target_modules: 'k_proj' matched nothing"),
        ({"exclude_modules": ["nowhere"]}, "exclude_modules: 'nowhere' matched nothing"),
        ({"exclude_modules": "nowhere"}, "exclude_modules: 'nowhere' matched nothing"),
        ({"modules_to_save": ["score"]}, "modules_to_save: 'score' matched nothing"),
        ({"rank_pattern": {"^model.layers.0": 2}}, "rank_pattern: '^model.layers.0' matched nothing among the adapted"),
        ({"alpha_pattern": {"x": 2}}, "alpha_pattern: 'x' matched nothing among the adapted"),
        ({"target_parameters": ["experts.down"]}, "target_parameters: 'experts.down' matched nothing"),
    ],
)
def test_a_rule_that_matched_nothing_is_named(options: dict, note: str) -> None:
    (said,) = notes(**{"target_modules": ["q_proj"]} | options)
    assert said.startswith(note)


def test_the_notes_are_warnings_when_a_model_is_adapted_and_silence_means_none() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="target_modules: '7' matched nothing"):
        get_peft_model(net, LoraConfig(target_modules=["0", "7"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))


# -- modules -----------------------------------------------------------------------------------------


def test_a_parameter_of_the_model_itself_is_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(nn.Linear(2, 2).weight.detach())

    with pytest.raises(ValueError, match="w: belongs to the model itself"):
        get_peft_model(Net(), LoraConfig(target_parameters=["w"]))


@pytest.mark.parametrize("options", [{"target_modules": ["0"]}, {"modules_to_save": ["0"]}])
def test_a_module_and_its_parameter_are_not_adapted_both(options: dict) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"0\.weight: it (would be adapted as a module|belongs to a module)"):
        get_peft_model(net, LoraConfig(**{"target_modules": ["1"]} | options, target_parameters=["0.weight"]))
    assert type(net[0]) is nn.Linear


def test_a_shared_module_is_not_called_tied(recwarn):
    get_peft_model(Twice(), LoraConfig(r=2, target_modules=["a"]))
    assert not [w for w in recwarn if "tied" in str(w.message)]


def test_a_linear_layer_with_a_forward_of_its_own_is_warned_about():
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    with pytest.warns(UserWarning, match="Doubled has a forward of its own"):
        get_peft_model(nn.Sequential(Doubled(3, 3)), LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize("base", [nn.Embedding, nn.Conv1d])
def test_an_embedding_or_convolution_with_a_forward_of_its_own_is_refused(base):
    class Own(base):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.long() if base is nn.Embedding else nn.functional.pad(x, (2, 0)))

    net = nn.Sequential(Own(*((5, 3) if base is nn.Embedding else (3, 3, 3))))
    with pytest.raises(ValueError, match="0: Own computes its output in a forward of its own"):
        get_peft_model(net, LoraConfig(r=1, target_modules=["0"]))


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_computed_from_others_is_refused(wrap):
    net = nn.Sequential(wrap(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"0: .*its weight is computed from other parameters"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))


def test_the_projection_of_an_attention_is_not_saved_by_itself():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    config = LoraConfig(r=2, target_modules=["linear1"], modules_to_save=["out_proj"])
    with pytest.raises(ValueError, match="save the attention whole"):
        get_peft_model(net, config)


def test_an_encoder_that_makes_nested_tensors_is_warned_about():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    with pytest.warns(UserWarning, match="enable_nested_tensor=False"):
        get_peft_model(encoder, LoraConfig(r=2, target_modules=["linear1"]))


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^m: r=3 must be divisible by the convolution's groups=2"):
        adapt(nn.Conv1d(4, 4, 1, groups=2), r=3)


def test_an_embedding_that_rewrites_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^m: an embedding with max_norm"):
        adapt(nn.Embedding(4, 3, max_norm=1.0))


def test_multihead_attention_is_refused_where_it_would_never_run() -> None:
    net = nn.Sequential(OrderedDict(attn=nn.MultiheadAttention(8, 2), fc=nn.Linear(8, 8)))
    with pytest.raises(ValueError, match=r"^attn\.out_proj: nn\.MultiheadAttention reads out_proj\.weight"):
        get_peft_model(net, LoraConfig(target_modules=["fc", "out_proj"]))
    assert type(net.attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    rules = explain(net, LoraConfig(target_modules="all-linear")).to_dict()["modules"]
    assert "reads out_proj.weight without calling" in rules["attn.out_proj"]["rule"]
    model = get_peft_model(net, LoraConfig(target_modules="all-linear"))
    assert list(model.lora_layers()) == ["fc"]


def test_unsupported_modules_are_named() -> None:
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"^m: LSTM cannot be adapted; Linear, Conv1D"):
        adapt(nn.LSTM(3, 3))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "mica", "loftq"])
def test_an_init_that_reads_numbers_needs_some(init: str) -> None:
    options = {"loftq_config": LoftQConfig()} if init == "loftq" else {}
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"0: init_lora_weights=.* looks at the weight, which has no numbers yet"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=init, **options))
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora", "loftq", "corda", "mica", "lora_ga"])
def test_an_init_that_not_every_shape_allows_is_checked_before(init: str) -> None:
    check = METHODS[init].check
    assert check is not None
    with pytest.raises(ValueError, match=init):
        check((4, 8), 5, 1.0)


@pytest.mark.parametrize("held", [[], ["Sequential"]], ids=["each layer has a hook", "the block has one"])
def test_an_offloaded_layer_is_refused_whoever_loads_its_weight(held: list[str]) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    accelerate.cpu_offload(net[0], execution_device="cpu", preload_module_classes=held or None)
    with pytest.raises(ValueError, match=r"0\.0: its weight is offloaded: add the adapter before"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0.0"]))
