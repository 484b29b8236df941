"""Models of transformers whose methods raise, whose heads have other names, and that tie weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import WIDTHS, bert, gpt2, llama, randomise
from torch import nn

from lora_ref import (
    LoraConfig,
    PeftModel,
    explain,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from spec_tests import agree

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}


def convnext() -> Any:
    config = transformers.ConvNextConfig(num_channels=3, depths=[1], hidden_sizes=[8], num_stages=1, num_labels=2)
    return transformers.ConvNextForImageClassification(config)


def clip() -> Any:
    text = SMALL | {"vocab_size": 32, "max_position_embeddings": 8, "projection_dim": 8}
    vision = SMALL | {"image_size": 8, "patch_size": 4, "projection_dim": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def wav2vec2() -> Any:
    convs = {"conv_dim": (8,), "conv_stride": (2,), "conv_kernel": (3,), "num_conv_pos_embeddings": 4}
    groups = {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 1, "vocab_size": 8}
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SMALL | convs | groups))


class Raises(nn.Sequential):
    """Each method that lora_ref may ask raises, whatever the error."""

    error: type[Exception] = RuntimeError

    def get_input_embeddings(self) -> nn.Module:
        raise self.error("no")

    get_output_embeddings = enable_input_require_grads = get_input_embeddings
    is_gradient_checkpointing = True


FOREIGN: dict[str, tuple[Any, dict[str, Any]]] = {
    "ConvNext": (convnext, {"target_modules": ["pwconv1", "classifier"]}),
    "CLIP": (clip, {"target_modules": ["q_proj"]}),
    "Wav2Vec2": (wav2vec2, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    **{
        error.__name__: (
            lambda error=error: type("Raising", (Raises,), {"error": error})(nn.Linear(3, 3), nn.Linear(3, 2)),
            {"target_modules": "all-linear"},
        )
        for error in (RuntimeError, NotImplementedError, AttributeError, KeyError, TypeError)
    },
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.filterwarnings("ignore")
def test_a_model_whose_methods_raise_is_adapted_saved_and_loaded(name: str, tmp_path: Path) -> None:
    make, options = FOREIGN[name]
    torch.manual_seed(0)
    net = make().eval()
    plain = copy.deepcopy(net)
    model = randomise(get_peft_model(net, LoraConfig(r=2, **options)))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    again.load_adapter(tmp_path, "second")
    found = get_peft_model_state_dict(model)
    assert found and all(torch.equal(x, get_peft_model_state_dict(again)[key]) for key, x in found.items())
    set_peft_model_state_dict(again, found, "second")
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.unload().parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_the_head_of_a_question_answering_model_trains_and_is_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**WIDTHS | {"vocab_size": 32})
    net = transformers.BertForQuestionAnswering(config).double().eval()
    plain = copy.deepcopy(net)
    model = randomise(get_peft_model(net, LoraConfig(r=2, task_type="QUESTION_ANS")))
    assert model.peft_config["default"].modules_to_save == ["qa_outputs"]
    trains = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert trains == [f"base_model.model.qa_outputs.modules_to_save.default.{kind}" for kind in ("weight", "bias")]
    model.save_pretrained(tmp_path)
    tokens = torch.tensor([[3, 5, 7]])
    again = PeftModel.from_pretrained(plain, tmp_path)
    agree(again(input_ids=tokens).start_logits, model.eval()(input_ids=tokens).start_logits)


@pytest.mark.parametrize("make", [nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList])
def test_a_container_that_is_not_called_is_not_saved_whole(make: Any) -> None:
    item = nn.Parameter(torch.ones(2)) if "Parameter" in make.__name__ else nn.Linear(2, 2)
    net = nn.Sequential(nn.Linear(2, 2))
    net.heads = make({"a": item} if "Dict" in make.__name__ else [item])
    with pytest.raises(ValueError, match=f"heads: a {make.__name__} is not called, so no copy can take its place"):
        get_peft_model(net, LoraConfig(target_modules=["0"], modules_to_save=["heads"]))
    assert type(net.heads) is make and type(net[0]) is nn.Linear


class Indexes(nn.Module):
    """The head is a Sequential whose parts are called by their index."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head, self.other = (
            nn.Linear(2, 2),
            nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
            nn.Sequential(nn.Linear(2, 2)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.head[1](self.head[0](self.up(x))))


class Iterates(Indexes):
    """As Indexes, in a loop."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.head:
            x = part(x)
        return self.other(x)


class Inherits(Indexes):
    """As Indexes, whose forward it has."""


class Calls(Indexes):
    """Its own forward calls the head."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.head(self.up(x)))


def test_a_sequential_that_a_class_calls_is_saved_whole_whatever_its_base_did() -> None:
    model = get_peft_model(Calls(), LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    assert model(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("cls", [Indexes, Iterates, Inherits])
def test_a_sequential_whose_parent_indexes_it_is_not_saved_whole(cls: Any) -> None:
    with pytest.raises(ValueError, match=f"head: {cls.__name__} indexes this Sequential: save the modules in it"):
        get_peft_model(cls(), LoraConfig(target_modules=["up"], modules_to_save=["head"]))
    model = get_peft_model(cls(), LoraConfig(target_modules=["up"], modules_to_save=["head.0", "other"]))
    assert model(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.parametrize("saved", ["embed_tokens", "lm_head"])
def test_a_tied_weight_that_is_saved_whole_is_warned_about(saved: str) -> None:
    options = {"target_modules": ["q_proj"], "modules_to_save": [saved]}
    with pytest.warns(UserWarning, match=f"{saved}: its weight is tied to .*; the copy that trains is not"):
        get_peft_model(llama(tie_word_embeddings=True), LoraConfig(**options))


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
@pytest.mark.filterwarnings("ignore")
def test_after_a_merge_that_ends_a_tie_the_config_says_so(option: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"target_modules": ["q_proj"]}
    options[option] = [*options.get(option, []), "lm_head"]
    net = llama(tie_word_embeddings=True)
    model = randomise(get_peft_model(net, LoraConfig(r=2, **options))).eval()
    tokens = torch.tensor([[3, 5, 7]])
    want = model(input_ids=tokens).logits
    plain = model.merge_and_unload()
    assert plain.config.tie_word_embeddings is False
    plain.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    agree(again.eval()(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    agree(plain(input_ids=tokens).logits, want)
    untouched = get_peft_model(llama(tie_word_embeddings=True), LoraConfig(r=2, target_modules=["q_proj"]))
    assert untouched.merge_and_unload().config.tie_word_embeddings is True


@pytest.mark.parametrize("option", ["target_modules", "modules_to_save"])
@pytest.mark.parametrize("name", ["t5", "bart", "bert"])
@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_ends_one_of_several_ties_leaves_a_model_that_can_be_saved(
    name: str, option: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tiny = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    makers = {"t5": t5, "bart": bart}
    made = transformers.BertForMaskedLM(transformers.BertConfig(**tiny, intermediate_size=24)).double()
    net = (makers[name]() if name in makers else made).eval()
    ends = {"target_modules": "predictions.decoder", "modules_to_save": "cls"}
    options: dict[str, Any] = {"target_modules": ["q", "q_proj", "query"]}
    options[option] = [*options.get(option, []), ends[option] if name == "bert" else "lm_head"]
    model = randomise(get_peft_model(net, LoraConfig(r=2, **options))).eval()
    tokens = torch.tensor([[3, 5, 7]])
    inputs = {"input_ids": tokens} | ({} if name == "bert" else {"decoder_input_ids": tokens})
    plain = model.merge_and_unload()
    want = plain(**inputs).logits
    assert plain.config.tie_word_embeddings is False
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path, dtype=want.dtype).eval()
    agree(again(**inputs).logits, want)


class Both(nn.Module):
    """Heads that are called by keyword, and one that gives a tuple."""

    def __init__(self, gives_tuple: bool) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)
        self.head: Any = nn.GRU(4, 2, batch_first=True) if gives_tuple else nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(input=self.up(x))


def test_a_saved_module_may_be_called_by_keyword_in_a_mixed_batch_and_a_tuple_is_refused() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["up"], modules_to_save=["head"])
    model = randomise(get_peft_model(Both(False).double(), config))
    model.add_adapter("other", config)
    model = randomise(model).eval()
    x = torch.randn(3, 3).double()
    mixed = model(x, adapter_names=["other", "__base__", "default"])
    for row, name in ((0, "other"), (2, "default")):
        model.set_adapter(name)
        agree(mixed[row], model(x)[row])
    with model.disable_adapter():
        agree(mixed[1], model(x)[1])
    model = get_peft_model(Both(True), config).eval()
    with pytest.raises(ValueError, match=r"adapter_names needs a tensor of GRU.*: do not save that module whole"):
        model(torch.randn(2, 5, 3), adapter_names=["default", "__base__"])


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return transformers.T5ForConditionalGeneration(config).double()


def bart() -> Any:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32, "max_position_embeddings": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "decoder_start_token_id": 2}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes | heads | ends)).double()


GENERATORS: dict[str, Any] = {"t5": t5, "bart": bart, "gpt2": gpt2, "llama": llama}
WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "several returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "greedy": {},
}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("in_config", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_each_prompt_is_generated_with_its_own_adapter(name: str, way: str, in_config: bool) -> None:
    torch.manual_seed(0)
    net = GENERATORS[name]().eval()
    targets = {"t5": ["q", "v"], "bart": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}[name]
    model = randomise(get_peft_model(net, LoraConfig(r=2, target_modules=targets)), 2.0).eval()
    prompts = torch.randint(3, 30, (2, 4))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0, "eos_token_id": 1} | WAYS[way]
    given: dict[str, Any] = {"generation_config": transformers.GenerationConfig(**settings)} if in_config else settings
    calls = {"attention_mask": torch.ones_like(prompts)} | given

    def run(**more: Any) -> torch.Tensor:
        torch.manual_seed(1)
        return model.generate(input_ids=prompts, **calls, **more)

    mixed = run(adapter_names=["default", "__base__"])
    rows = len(mixed) // 2
    assert torch.equal(mixed[:rows], run()[:rows])
    with model.disable_adapter():
        base = run()
    assert torch.equal(mixed[rows:], base[rows:])


def test_a_batch_of_a_wrong_size_is_still_refused_where_nothing_is_generated() -> None:
    model = get_peft_model(bert(), LoraConfig(r=2)).eval()
    with pytest.raises(ValueError, match="adapter_names has 2 names for a batch of 4 samples"):
        model(input_ids=torch.ones(4, 3, dtype=torch.long), adapter_names=["default", "__base__"])


def test_explain_of_an_adapted_model_needs_an_adapter() -> None:
    with pytest.raises(ValueError, match="config=None: the model has no adapter to explain"):
        explain(nn.Sequential(nn.Linear(2, 2)))
