"""Adapter folders move both ways between lora_ref and the installed PEFT, for every feature, with equal outputs.

Models are in float64 wherever the dtype is not what is tested.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import UpAndDown, bert, llama, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import lora_ref
from spec_tests import agree, close, distance

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's remarks on biases and embeddings

LIBRARIES = pytest.mark.parametrize(
    ("writer", "reader"), [(lora_ref, peft), (peft, lora_ref)], ids=["to peft", "from peft"]
)


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes Llama's norms in float32, in models of float64 too; here it does not."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


class Zoo(nn.Module):
    """A layer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 4, padding_idx=0)
        self.conv1, self.conv2, self.conv3 = nn.Conv1d(4, 6, 3, padding=1), nn.Conv2d(1, 2, 2), nn.Conv3d(1, 2, 2)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 6), "down": Conv1D(4, 6)}) for _ in range(3))
        self.experts, self.transposed = UpAndDown(2, 4, 6, False), UpAndDown(2, 4, 6, True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, time)
        x = self.tokens(tokens)
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        x = x + self.experts(x)
        x = x + self.transposed(x)
        maps = self.conv1(x.mT).sum(), self.conv2(x[:, None]).sum(), self.conv3(x[None, None].contiguous()).sum()
        return self.head(self.norm(x)) + sum(maps) / 10


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (Zoo, {"target_modules": ["up", "head"]}),
    "transposed storage": (Zoo, {"target_modules": ["down"]}),
    "embedding": (Zoo, {"target_modules": ["tokens"]}),
    "convolutions": (Zoo, {"target_modules": ["conv1", "conv2", "conv3"]}),
    "mixed": (Zoo, {"target_modules": ["tokens", "up", "down", "conv2"], "lora_dropout": 0.5}),
    "regex": (Zoo, {"target_modules": r"layers\.[02]\.(up|down)", "exclude_modules": r".*0\.up"}),
    "all-linear": (Zoo, {"target_modules": "all-linear", "exclude_modules": ["head"]}),
    "layers": (Zoo, {"target_modules": ["up", "down"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "one layer": (Zoo, {"target_modules": ["up"], "layers_to_transform": 1, "layers_pattern": ["layers"]}),
    "patterns": (
        Zoo,
        {
            "target_modules": ["up", "down", "tokens", "conv1"],
            "rank_pattern": {r"layers\.1\..*": 2, "tokens": 7},
            "alpha_pattern": {"^layers.0.up": 32, "up": 0.5},
        },
    ),
    "rslora": (Zoo, {"target_modules": ["up", "tokens"], "use_rslora": True, "rank_pattern": {"up": 5}}),
    "bias all": (Zoo, {"target_modules": ["up", "conv1"], "bias": "all"}),
    "bias lora_only": (Zoo, {"target_modules": ["up", "down", "conv1"], "bias": "lora_only"}),
    "modules_to_save": (Zoo, {"target_modules": ["up"], "modules_to_save": ["head", "tokens", "norm"]}),
    "modules_to_save, bias all": (Zoo, {"target_modules": ["up"], "modules_to_save": ["head", "norm"], "bias": "all"}),
    "parameter": (Zoo, {"target_parameters": ["experts.up"]}),
    "2-D parameter": (Zoo, {"target_parameters": ["head.weight"], "target_modules": ["up"]}),
    "nested parameters": (Zoo, {"target_parameters": ["experts.up", "experts.down"], "rank_pattern": {"up": 3}}),
    "nested, reversed": (Zoo, {"target_parameters": ["experts.down", "experts.up"]}),
    "transposed parameters": (Zoo, {"target_parameters": ["transposed.up", "transposed.down"], "bias": "all"}),
    "llama": (llama, {"task_type": "CAUSAL_LM"}),
    "llama embeddings": (llama, {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "llama head": (llama, {"task_type": "CAUSAL_LM", "target_modules": ["lm_head"]}),
    "llama full name": (llama, {"target_modules": ["model.embed_tokens"]}),
    "llama regex": (llama, {"target_modules": r"model\.embed_tokens|.*q_proj"}),
    "llama tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens"]}),
    "llama saved head": (llama, {"target_modules": "all-linear", "modules_to_save": ["lm_head", "embed_tokens"]}),
    "bert": (bert, {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "bias": "lora_only"}),
}

TOKENS = torch.tensor([[1, 3, 0, 8], [2, 2, 5, 7]])


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y = model.eval()(TOKENS)
    return getattr(y, "logits", y)


def adapted(library: Any, model: nn.Module, adapter_name: str = "default", **options: Any) -> Any:
    model = library.get_peft_model(
        copy.deepcopy(model), library.LoraConfig(r=4, **copy.deepcopy(options)), adapter_name
    )
    torch.manual_seed(1)
    return randomise(model)


@LIBRARIES
@pytest.mark.parametrize("case", CASES)
def test_a_folder_loads_in_the_other_library(case: str, writer: Any, reader: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, options = CASES[case]
    base = make().double()
    model = adapted(writer, base, **options)
    assert distance(output(model), output(base)) > 0.01
    model.save_pretrained(tmp_path)
    loaded = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    agree(output(loaded), output(model))
    trains = [name for name, p in loaded.named_parameters() if p.requires_grad]
    # PEFT leaves the biases of a frozen adapter trainable
    assert not [name for name in trains if reader is lora_ref or not name.endswith(".bias")]


@pytest.mark.parametrize("case", CASES)
def test_both_write_the_same_folder(case: str, tmp_path: Path) -> None:
    """The same names, numbers and options; PEFT's copies of biases in modules_to_save, never read, aside."""
    torch.manual_seed(0)
    make, options = CASES[case]
    base = make().double()
    theirs, ours = adapted(peft, base, **options), adapted(lora_ref, base, **options)
    ours.load_state_dict(theirs.state_dict())
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    want, got = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    if options.get("bias") == "all" and "modules_to_save" in options:
        want = {key: t for key, t in want.items() if ".original_module." not in key and ".modules_to_save." not in key}
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    want, got = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("theirs", "ours"))
    for key in got:
        if key in ("target_modules", "modules_to_save") and isinstance(got[key], list):
            left_out = {"head"} if case == "all-linear" else set()  # PEFT's list names what exclude_modules excludes
            assert set(got[key]) == set(want[key] or []) - left_out, key
        elif key != "base_model_name_or_path":
            assert (got[key] or None) == (want[key] or None), key


@LIBRARIES
def test_adapters_of_other_names_lie_in_folders_of_their_own(writer: Any, reader: Any, tmp_path: Path) -> None:
    base = Zoo().double()
    model = adapted(writer, base, "first", target_modules=["up"])
    model.add_adapter("second", writer.LoraConfig(r=2, target_modules=["down", "tokens"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    loaded = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "first", adapter_name="1")
    loaded.load_adapter(tmp_path / "second", adapter_name="2")
    for name, theirs in (("first", "1"), ("second", "2")):
        model.set_adapter(name), loaded.set_adapter(theirs)
        agree(output(loaded), output(model))
    chosen = tmp_path / "chosen"
    model.save_pretrained(chosen, selected_adapters=["second"])
    assert [path.name for path in chosen.iterdir() if path.is_dir()] == ["second"]


@LIBRARIES
def test_a_trainable_load_trains_what_trained(writer: Any, reader: Any, tmp_path: Path) -> None:
    base = Zoo().double()
    model = adapted(writer, base, target_modules=["up"], bias="lora_only", modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    loaded = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    names = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, loaded)]
    assert names[1] == names[0]


@LIBRARIES
def test_a_merged_adapter_is_saved_as_itself(writer: Any, reader: Any, tmp_path: Path) -> None:
    base = Zoo().double()
    model = adapted(writer, base, target_modules=["up", "tokens"])
    before = output(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    loaded = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    agree(output(loaded), before)


@LIBRARIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_base_of_any_dtype(writer: Any, reader: Any, dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama().to(dtype)
    config = writer.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    model = writer.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=autocast)
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = reader.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=autocast)
    dtypes = [{name: p.dtype for name, p in m.named_parameters()} for m in (model, loaded)]
    assert dtypes[1] == dtypes[0]
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in model.named_parameters())
    outputs = output(loaded), output(model)
    assert all(y.dtype == dtype and y.isfinite().all() for y in outputs)
    agree(output(loaded.double()), output(model.double()))


@pytest.mark.parametrize("save_embedding_layers", [True, False, "auto"])
def test_save_embedding_layers_is_understood_alike(save_embedding_layers: bool | str, tmp_path: Path) -> None:
    base = llama()
    for targets in (["q_proj"], ["q_proj", "embed_tokens"]):
        keys = []
        for library in (peft, lora_ref):
            model = adapted(library, base, target_modules=targets)
            model.save_pretrained(tmp_path, save_embedding_layers=save_embedding_layers)
            keys.append(set(load_file(tmp_path / "adapter_model.safetensors")))
        assert keys[1] == keys[0]


@pytest.mark.parametrize("name", ["EvaConfig", "LoftQConfig", "CordaConfig", "LoraGAConfig"])
def test_the_options_of_inits_have_the_defaults_of_peft(name: str) -> None:
    ours, theirs = getattr(lora_ref, name)(), getattr(peft.tuners.lora.config, name)()
    assert {field: getattr(theirs, field) for field in vars(ours)} == vars(ours)


class Recurrent(nn.Module):
    """Biases that are not called "bias"."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gru, self.lstm = nn.Linear(4, 4), nn.GRU(4, 4, bidirectional=True), nn.LSTM(8, 4)
        self.attention, self.norm = nn.MultiheadAttention(4, 1, add_bias_kv=True), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(self.gru(self.fc(x))[0])[0]
        return self.norm(self.attention(x, x, x)[0])


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize(("writer", "reader"), [(lora_ref, peft), (peft, lora_ref), (lora_ref, lora_ref)])
def test_biases_by_other_names_go_both_ways(writer: Any, reader: Any, bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Recurrent().double()
    base, x = copy.deepcopy(net), torch.randn(3, 2, 4, dtype=torch.float64)
    model = randomise(writer.get_peft_model(net, writer.LoraConfig(r=2, target_modules=["fc"], bias=bias)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "bias" in name:
                parameter += 1
    model.save_pretrained(tmp_path)
    agree(reader.PeftModel.from_pretrained(base, tmp_path)(x), model.eval()(x))


def test_a_file_that_lacks_some_of_these_biases_is_broken(tmp_path: Path) -> None:
    net = Recurrent()
    base = copy.deepcopy(net)
    lora_ref.get_peft_model(net, lora_ref.LoraConfig(r=2, target_modules=["fc"], bias="all")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.gru.bias_ih_l0"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"gru\.bias_ih_l0: is missing"):
        lora_ref.PeftModel.from_pretrained(base, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_single_experts_is_refused_with_the_way_round(tmp_path: Path) -> None:
    """transformers 4 had a module for each expert. PEFT converts such a folder, and what it saves is read."""
    torch.manual_seed(0)
    tiny = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    experts = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    net = transformers.MixtralForCausalLM(transformers.MixtralConfig(**tiny, **experts)).eval()
    peft.LoraConfig(r=2, target_modules=["w1", "w2", "w3"], inference_mode=True).save_pretrained(tmp_path)
    tensors = {}
    for expert in range(2):
        for name, n_in, n_out in (("w1", 16, 24), ("w2", 24, 16), ("w3", 16, 24)):
            key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            tensors |= {f"{key}.lora_A.weight": torch.randn(2, n_in), f"{key}.lora_B.weight": torch.randn(n_out, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"experts\.0\.w1.* Load the folder with PEFT 0\.21 and save it again"):
        lora_ref.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    x = torch.tensor([[1, 2, 3]])
    converted = peft.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path)
    converted.save_pretrained(tmp_path / "new")
    ours = lora_ref.PeftModel.from_pretrained(copy.deepcopy(net), tmp_path / "new")
    want = converted(input_ids=x).logits
    close(ours(input_ids=x).logits, want, terms=2**10, size=float(want.abs().max()))
