"""QLoRA: adapters on layers of bitsandbytes and torchao. Both wheels run on CPUs."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import Snapshot, llama, randomise
from safetensors.torch import save_file
from torch import nn

import lora_ref
from lora_ref import LoraConfig, PeftModel, get_peft_model
from lora_ref.api.quantized import dequantized, prepare_model_for_kbit_training, replace_lora_weights_loftq
from spec_tests import close

pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.linspace(-1, 1, 3 * 64).reshape(3, 64)


def packed_by_bitsandbytes(kind: str) -> Any:
    bnb = pytest.importorskip("bitsandbytes", reason="needs lora_ref[quantized]")
    options = {"threshold": 6.0, "has_fp16_weights": False} if kind == "Linear8bitLt" else {"quant_type": "nf4"}

    def layer(plain: nn.Linear) -> nn.Module:
        made = getattr(bnb.nn, kind)(plain.in_features, plain.out_features, **options)
        made.load_state_dict(plain.state_dict())
        return made.to("cpu")

    return lambda net: nn.Sequential(*(layer(m) if isinstance(m, nn.Linear) else m for m in net))


def packed_by_torchao(config: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="needs lora_ref[quantized]")

    def quantize(net: nn.Module) -> nn.Module:
        quantization.quantize_(net, getattr(quantization, config)())
        return net

    return quantize


PACKED: dict[str, Any] = {
    "bitsandbytes, 8 bits": lambda: packed_by_bitsandbytes("Linear8bitLt"),
    "bitsandbytes, 4 bits": lambda: packed_by_bitsandbytes("Linear4bit"),
    "torchao, 8 bits": lambda: packed_by_torchao("Int8WeightOnlyConfig"),
}


def plain_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32))


@pytest.fixture(params=PACKED)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return PACKED[request.param]()(plain_net())


def config(library: Any = lora_ref, **options: Any) -> Any:
    return library.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["0", "2"]} | options)


def fill(model: nn.Module) -> nn.Module:
    """Numbers for the factors that do not depend on the library."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.sin(torch.arange(parameter.numel()).float()).reshape(parameter.shape) / 8
    return model


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    """Both libraries add the same two float32 numbers, each from sums of up to 64 products, in two layers."""
    close(got.detach(), want.detach(), terms=4 * (64 + 4), size=float(want.detach().abs().max()))


def test_outputs_and_gradients_are_pefts(net: nn.Module) -> None:
    """One layer is adapted: of two, 8 bits of the input of the second depend on the last bit of the first's output."""
    found = []
    for library in (peft, lora_ref):
        model = fill(library.get_peft_model(copy.deepcopy(net), config(library, target_modules=["2"])))
        x = X.clone().requires_grad_(True)
        y = model(x)
        y.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((y, x.grad, grads))
    (y, dx, grads), (y_here, dx_here, grads_here) = found
    same(y_here, y)
    same(dx_here, dx)
    assert grads.keys() == grads_here.keys() and len(grads) == 2
    for name, grad in grads.items():
        same(grads_here[name], grad)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
@pytest.mark.parametrize("training", [False, True])
def test_adapting_does_not_change_the_packed_layers(kind: str, training: bool) -> None:
    """bitsandbytes repacks a weight for inference, and picks a dtype, in a first call without gradients."""
    plain = packed_by_bitsandbytes(kind)(plain_net()).train(training)
    net = copy.deepcopy(plain)
    model = get_peft_model(net, config())
    for i in (0, 2):
        now, then = net[i].get_base_layer(), plain[i]
        assert torch.equal(now.weight.data, then.weight.data)
        assert getattr(now, "compute_dtype", None) == getattr(then, "compute_dtype", None)
        state, before = (getattr(m.weight, "quant_state", None) for m in (now, then))
        assert getattr(state, "packing_format_for_cpu", None) == getattr(before, "packing_format_for_cpu", None)
    model(X.clone().requires_grad_(True)).sum().backward()


def test_outputs_and_gradients_in_evaluation_mode_are_pefts() -> None:
    found = []
    for library in (peft, lora_ref):
        net = packed_by_bitsandbytes("Linear4bit")(plain_net()).eval()
        model = fill(library.get_peft_model(net, config(library)))
        y = model(X.clone().requires_grad_(True))
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == 5
    for one, other in zip(*found, strict=True):
        same(other, one)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_weights_that_are_stored_in_floats_are_packed_all_the_same(storage: torch.dtype) -> None:
    """As FSDP needs it."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs lora_ref[quantized]")
    layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=storage)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    net = nn.Sequential(layer.to("cpu"))
    for targets in (["0"], "all-linear"):
        model = get_peft_model(copy.deepcopy(net), config(target_modules=targets))
        assert list(model.lora_layers()) == ["0"] and model(X).shape == (3, 32)


def test_a_packed_layer_is_not_saved_whole(net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"2: it has a quantised weight, which cannot train in full; dequantise"):
        get_peft_model(net, config(target_modules=["0"], modules_to_save=["2"]))
    assert not any("lora_" in name for name, _ in net.named_modules())


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_cast_of_the_parameters_leaves_packed_weights(kind: str) -> None:
    net = packed_by_bitsandbytes(kind)(plain_net())
    model = get_peft_model(net, config(target_modules=["2"]))
    before = net[0].weight.data.clone()
    lora_ref.cast_mixed_precision_params(model, torch.bfloat16)
    assert net[0].weight.dtype == before.dtype and torch.equal(net[0].weight.data, before)
    assert net[0].bias.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_a_layer_that_passes_no_gradient_is_named() -> None:
    net = packed_by_torchao("Int8DynamicActivationInt8WeightConfig")(plain_net())
    with pytest.warns(UserWarning, match=r"0: its \w+ passes no gradient to its input"):
        get_peft_model(net, config())


@torch.no_grad()
def test_adapters_are_switched_mixed_and_removed(net: nn.Module) -> None:
    base = net.eval().requires_grad_(False)(X)  # for gradients bitsandbytes has another kernel
    model = fill(get_peft_model(net, config(target_modules=["2"])))
    model.add_adapter("other", config(r=2, target_modules=["2"]))
    before = model(X).detach()
    model.set_adapter("other")
    assert torch.equal(model(X), base)  # its B is zero
    with model.disable_adapter():
        assert torch.equal(model(X), base)
    model.set_adapter("default")
    mixed = model(X, adapter_names=["default", "__base__", "other"])
    same(mixed[:1], before[:1])
    same(mixed[1:], base[1:])
    assert model.unload() is net and torch.equal(net(X), base)
    assert not any("lora_" in name for name, _ in net.named_modules())


@pytest.mark.parametrize(("writer", "reader"), [(lora_ref, peft), (peft, lora_ref)], ids=["to peft", "from peft"])
def test_files_go_both_ways(net: nn.Module, writer: Any, reader: Any, tmp_path: Path) -> None:
    model = fill(writer.get_peft_model(copy.deepcopy(net), config(writer, target_modules=["2"]))).eval()
    model.save_pretrained(tmp_path)
    same(reader.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)(X), model(X))


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_with_the_way_round(net: nn.Module, call: str) -> None:
    model = fill(get_peft_model(net, config()))
    before = model(X).detach()
    with pytest.raises(
        ValueError, match=r"quantised weight, which no update can be added to; dequantise the model first"
    ):
        getattr(model, call)()
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("init", ["pissa", "olora", "mica", "corda", "lora_ga"])
def test_inits_that_read_the_weight_are_refused_with_the_way_round(net: nn.Module, init: str) -> None:
    with pytest.raises(ValueError, match=rf"'{init}' (reads the weight, which is quantised: dequantise|needs data)"):
        get_peft_model(net, config(init_lora_weights=init))
    assert not any("lora_" in name for name, _ in net.named_modules())


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_inits_that_do_not_read_the_weight_are_those_of_a_plain_layer(net: nn.Module, init: Any) -> None:
    found = []
    for base in (net, plain_net()):
        torch.manual_seed(1)
        found.append(
            get_peft_model(base, config(init_lora_weights=init)).base_model.lora_layers()["0"].factors("default")
        )
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)


def test_a_weight_that_nothing_can_compute_with_is_refused() -> None:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    net = nn.Sequential(layer)
    before = Snapshot(net)
    with pytest.raises(ValueError, match=r"0: its weight is a tensor of torch\.float8_e4m3fn, on which Linear cannot"):
        get_peft_model(net, LoraConfig(r=2, target_modules=["0"]))
    assert Snapshot(net) == before


@pytest.mark.parametrize("make", [lambda: nn.Embedding(4, 4), lambda: nn.Conv1d(4, 4, 1)], ids=["embedding", "conv"])
def test_other_layers_are_refused_when_they_are_quantised(make: Any) -> None:
    layer = make()
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"its weight is a tensor of torch\.int8; only linear layers can be adapted"):
        get_peft_model(nn.Sequential(layer), LoraConfig(r=2, target_modules=["0"]))


def test_loftq_after_the_fact_brings_the_layer_nearer_to_the_original(tmp_path: Path) -> None:
    plain = plain_net()
    save_file(plain.state_dict(), tmp_path / "model.safetensors")
    net = PACKED["bitsandbytes, 4 bits"]()(copy.deepcopy(plain))
    model = get_peft_model(net, config(r=8, lora_alpha=4))
    errors = [(plain[i].weight - dequantized(net[i].get_base_layer())).norm() for i in (0, 2)]
    seen = []
    replace_lora_weights_loftq(model, tmp_path, callback=lambda m, name: seen.append(name) or name == "0")
    assert seen == ["0", "2"]
    layers = model.lora_layers()
    assert not layers["2"].factors("default")[1].any()  # rolled back
    for path in (None, tmp_path, tmp_path / "model.safetensors"):
        if path is None:
            model.get_base_model().name_or_path = str(tmp_path)
        replace_lora_weights_loftq(model, path)
        for i, before in zip((0, 2), errors, strict=True):
            E = plain[i].weight - dequantized(net[i].get_base_layer())
            left = (E - layers[str(i)].delta("default")).norm()
            best = torch.linalg.svdvals(E)[8:].norm()
            assert left < 0.9 * before
            close(left, best, terms=64 * 64, size=float(before))
    for i in (0, 2):  # in evaluation, without gradients, bitsandbytes packs the weights in another way
        Q = dequantized(net[i].get_base_layer())
        net[i].get_base_layer().eval()(torch.ones(1, 64))
        packed = net[i].get_base_layer().weight.data.clone()
        distance = (dequantized(net[i].get_base_layer()) - Q).abs().max()
        assert distance <= Q.abs().max() * 2**-8  # it keeps the scales in bfloat16
        assert torch.equal(net[i].get_base_layer().weight.data, packed)
    with pytest.raises(ValueError, match=r"no safetensors file there holds 0\.weight"):
        replace_lora_weights_loftq(model, tmp_path / "nothing")
    with pytest.raises(ValueError, match="no layer of adapter 'default' is a Linear4bit"):
        replace_lora_weights_loftq(get_peft_model(plain, config()), tmp_path)


def test_loftq_after_the_fact_wants_a_place_and_a_scaling(tmp_path: Path) -> None:
    model = get_peft_model(PACKED["bitsandbytes, 4 bits"]()(plain_net()), config())
    with pytest.raises(ValueError, match="model_path=None: the base model does not say where it came from"):
        replace_lora_weights_loftq(model)
    model.base_model.set_scale("default", 0)
    with pytest.raises(ValueError, match="0: its scaling is 0"):
        replace_lora_weights_loftq(model, tmp_path)


@pytest.mark.parametrize(("kind", "backend"), zip(PACKED, ("Bnb8bit", "Bnb4bit", "Torchao"), strict=True))
def test_the_status_names_the_backend_as_peft_does(kind: str, backend: str) -> None:
    """Without a GPU, PEFT has no layers of its own for them, and names none."""
    theirs = pytest.importorskip("peft.utils.quantization_utils")
    found = lora_ref.get_layer_status(lora_ref.get_peft_model(PACKED[kind]()(plain_net()), config()))
    assert {layer.quantization_backend for layer in found} == {getattr(theirs, f"{backend}Backend").backend_name}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_that_pass_gradients_are_adapted_without_a_warning(kind: str) -> None:
    net = PACKED[kind]()(plain_net())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(net, config())


def test_preparing_for_training_is_pefts() -> None:
    found = []
    for prepare in (peft.prepare_model_for_kbit_training, prepare_model_for_kbit_training):
        torch.manual_seed(0)
        net = PACKED["bitsandbytes, 4 bits"]()(plain_net())
        net.extend([nn.LayerNorm(32).half(), nn.LayerNorm(32).double()])
        net.is_loaded_in_4bit = True
        asked: list[Any] = []
        net.gradient_checkpointing_enable = lambda gradient_checkpointing_kwargs, asked=asked: asked.append(
            gradient_checkpointing_kwargs
        )
        net.enable_input_require_grads = lambda asked=asked: asked.append("inputs")
        assert prepare(net) is net
        found.append(([(n, p.dtype, p.requires_grad) for n, p in net.named_parameters()], asked))
    assert found[0] == found[1]
    model = llama()
    assert prepare_model_for_kbit_training(model) is model and not model.is_gradient_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(get_peft_model(randomise(model), LoraConfig(r=2)), PeftModel)
