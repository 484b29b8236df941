"""A quick guide to PEFT, run with `from peft import ...` changed to `from lora_ref import ...` and nothing else.

The models are transformers' own classes with small random weights, in float64. Each block runs with
both libraries, on one seed, and has to give the same numbers.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import lora_ref
from spec_tests import agree, distance

pytestmark = pytest.mark.filterwarnings("ignore")  # fan_in_fan_out, generation without a pad token

VOCABULARY = 32
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computes losses and some norms in float32, in models of float64 too; here it does not."""

    def norm(self: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    for cls in (LlamaRMSNorm, T5LayerNorm):
        monkeypatch.setattr(cls, "forward", norm)


def gpt2() -> GPT2LMHeadModel:
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    shape = {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 24}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **ends)).double()


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, pad_token_id=0, **WIDTHS)
    return LlamaForCausalLM(config).double()


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=3, **WIDTHS)).double()


def t5() -> T5ForConditionalGeneration:
    shape = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **shape)).double()


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 8, **batch: torch.Tensor) -> list[float]:
    """The loss before each step; the seed fixes the dropout masks."""
    torch.manual_seed(1)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        assert loss.dtype == torch.float64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def pair(base: nn.Module, **options: Any) -> tuple[Any, Any]:
    """PEFT's model and ours, ours with the numbers that PEFT drew."""
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options))
    ours = lora_ref.get_peft_model(copy.deepcopy(base), lora_ref.LoraConfig(**options))
    ours.load_state_dict(theirs.state_dict())
    return theirs.eval(), ours.eval()


CAUSAL = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, storage not said": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "gpt2, default targets": (gpt2, {}),
    "llama": (llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "llama, default targets": (llama, {}),
    "llama, all-linear": (llama, {"target_modules": "all-linear"}),
}


@pytest.mark.usefixtures("masks_of_torch")
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_language_model_from_config_to_merged_model(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    make, options = CAUSAL[name]
    base, batch = make().eval(), {"input_ids": tokens(), "labels": tokens()}

    task = lora_ref.TaskType.CAUSAL_LM
    assert task == peft.TaskType.CAUSAL_LM == "CAUSAL_LM"
    theirs, ours = pair(base, r=8, lora_alpha=16, lora_dropout=0.1, bias="none", task_type=task, **options)
    theirs.print_trainable_parameters()
    want = capsys.readouterr().out
    ours.print_trainable_parameters()
    assert capsys.readouterr().out == want

    losses = train(ours, **batch)
    assert losses[-1] < losses[0] - 0.02
    agree(losses, train(theirs, **batch))

    prompt = {"input_ids": tokens()[:1, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    written = ours.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert written.tolist() == theirs.generate(**prompt, max_new_tokens=6, do_sample=False).tolist()

    ours.save_pretrained(tmp_path / "adapter")
    logits = ours(tokens(1)).logits
    for library in (lora_ref, peft):
        loaded = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
        agree(loaded(tokens(1)).logits, logits)
        assert loaded.generate(**prompt, max_new_tokens=6, do_sample=False).tolist() == written.tolist()
    with ours.disable_adapter():
        assert torch.equal(ours(tokens(1)).logits, base(tokens(1)).logits)

    merged = ours.merge_and_unload()
    assert type(merged) is type(base) and list(merged.state_dict()) == list(base.state_dict())
    agree(merged(tokens(1)).logits, logits)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", torch_dtype="auto").eval()
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in merged.named_parameters())
    agree(plain(tokens(1)).logits, merged(tokens(1)).logits)


def test_a_sequence_classifier_trains_and_saves_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = bert().eval()
    batch = {"input_ids": tokens(), "labels": torch.tensor([0, 2, 1, 2])}
    theirs, ours = pair(
        base, task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "value"], lora_dropout=0
    )
    losses = train(ours, **batch)
    assert losses[-1] < losses[0] - 0.02
    agree(losses, train(theirs, **batch))
    assert distance(ours.get_base_model().classifier.weight, base.classifier.weight) > 0.01
    ours.save_pretrained(tmp_path)
    for library in (lora_ref, peft):
        loaded = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        agree(loaded(tokens(1)).logits, ours(tokens(1)).logits)
    with ours.disable_adapter():
        assert torch.equal(ours(tokens(1)).logits, base(tokens(1)).logits)


def test_t5_has_default_targets() -> None:
    torch.manual_seed(0)
    theirs, ours = pair(t5(), task_type="SEQ_2_SEQ_LM", r=8, lora_alpha=32, inference_mode=False)
    ends = {name.rpartition(".")[2] for name in ours.targeted_module_names}
    assert ends == {"q", "v"} and set(ours.targeted_module_names) == set(theirs.base_model.targeted_module_names)
    batch = {"input_ids": tokens(), "labels": tokens(1)}
    agree(ours(**batch).logits, theirs(**batch).logits)


def test_several_adapters_and_a_weighted_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = llama().eval()
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    models = pair(base, **options)
    theirs, ours = models
    for library, model in zip((peft, lora_ref), models, strict=True):
        model.add_adapter(
            "other", library.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
    ours.load_state_dict(theirs.state_dict())
    for model in models:
        model.add_weighted_adapter(["default", "other"], [0.7, 0.3], combination_type="cat", adapter_name="both")
    for name in ("other", "both", "default"):
        for model in models:
            model.set_adapter(name)
        agree(ours(tokens()).logits, theirs(tokens()).logits)
    mixed = ["default", "__base__", "other", "both"]
    agree(ours.eval()(tokens(), adapter_names=mixed).logits, theirs.eval()(tokens(), adapter_names=mixed).logits)
    ours.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["both", "other"]
    for model in models:
        model.delete_adapter("both")
        model.set_adapter("default")
    agree(ours(tokens()).logits, theirs(tokens()).logits)
    assert torch.equal(ours.unload()(tokens()).logits, base(tokens()).logits)
