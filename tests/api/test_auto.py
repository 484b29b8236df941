"""One class under six names, and loaders that read the base model, too."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models import bert, llama, randomise

import lora_ref
from lora_ref import LoraConfig, PeftModel, get_peft_model
from lora_ref.api.peft_model import BY_TASK
from spec_tests import agree

pytestmark = pytest.mark.filterwarnings("ignore")
TOKENS = torch.tensor([[3, 5, 7]])


@pytest.mark.parametrize("task", list(lora_ref.TaskType))
def test_the_class_is_that_of_the_task_as_in_peft(task: str) -> None:
    make = llama if task.endswith("_LM") else bert
    ours = get_peft_model(make(), LoraConfig(task_type=task))
    theirs = peft.get_peft_model(make(), peft.LoraConfig(task_type=task))
    assert type(ours).__name__ == type(theirs).__name__ == BY_TASK[task].__name__
    assert isinstance(ours, PeftModel) and getattr(lora_ref, type(ours).__name__) is type(ours)
    made = type(ours)(bert(), LoraConfig())  # the class says the task
    assert made.peft_config["default"].task_type == task
    assert repr(made).startswith(f"{type(ours).__name__}(BertForSequenceClassification")


def test_a_task_of_the_configuration_stays() -> None:
    model = lora_ref.PeftModelForCausalLM(bert(), LoraConfig(task_type="SEQ_CLS"))
    assert model.peft_config["default"].task_type == "SEQ_CLS"
    assert type(get_peft_model(bert(), LoraConfig())) is PeftModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_base_and_adapter_come_from_one_folder_as_in_peft(folder: Path) -> None:
    ours = lora_ref.AutoPeftModelForCausalLM.from_pretrained(folder)
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert type(ours).__name__ == type(theirs).__name__ == "PeftModelForCausalLM"
    assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    agree(ours(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits)
    trains = lora_ref.AutoPeftModelForCausalLM.from_pretrained(folder, adapter_name="mine", is_trainable=True)
    assert trains.active_adapters == ["mine"] and any(p.requires_grad for p in trains.parameters())
    half = lora_ref.AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.get_base_model().lm_head.weight.dtype == torch.bfloat16
    plain = lora_ref.AutoPeftModel.from_pretrained(folder)
    assert type(plain.get_base_model()).__name__ == "LlamaForCausalLM" and type(plain) is type(ours)


def test_what_is_not_there_or_of_another_task_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task_type='CAUSAL_LM', but AutoPeftModelForTokenClassification is for"):
        lora_ref.AutoPeftModelForTokenClassification.from_pretrained(folder)
    with pytest.raises(FileNotFoundError):
        lora_ref.AutoPeftModel.from_pretrained(tmp_path / "nothing")
    with pytest.raises(OSError, match=r"call AutoPeftModel\.from_pretrained\(folder\)"):
        lora_ref.AutoPeftModel(folder)
    get_peft_model(llama(), LoraConfig(r=2)).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match="base_model_name_or_path is empty"):
        lora_ref.AutoPeftModel.from_pretrained(tmp_path / "nameless")


def test_the_names_of_the_loaders_are_pefts() -> None:
    names: Any = [name for name in lora_ref.__all__ if name.startswith(("Auto", "PeftModelFor"))]
    assert len(names) == 13 and all(hasattr(peft, name) and hasattr(lora_ref, name) for name in names)


def tokenizer_of(tokens: int, folder: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(tokens)}, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


@pytest.mark.parametrize("more", [-3, 0, 4])
def test_a_tokenizer_grows_the_embeddings_and_never_cuts_them(folder: Path, more: int) -> None:
    """Most models have more rows than their tokenizer has tokens."""
    rows = llama().get_input_embeddings().weight.shape[0]
    tokenizer_of(rows + more, folder)
    found = []
    for library in (lora_ref, peft):
        model = library.AutoPeftModelForCausalLM.from_pretrained(folder)
        found.append(model.get_input_embeddings().weight.shape[0])
    assert found == [rows + max(more, 0)] * 2


def test_an_adapter_without_a_task_is_loaded_as_the_class_says(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomise(get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"]), "mine"))
    model.save_pretrained(tmp_path)
    again = lora_ref.AutoPeftModelForCausalLM.from_pretrained(tmp_path, subfolder="mine")
    agree(again(input_ids=TOKENS).logits, model.eval()(input_ids=TOKENS).logits)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
def test_a_second_adapter_has_the_head_of_the_task_and_a_loaded_model_its_class(task: str, tmp_path: Path) -> None:
    names = {
        "SEQ_CLS": "BertForSequenceClassification",
        "TOKEN_CLS": "BertForTokenClassification",
        "QUESTION_ANS": "BertForQuestionAnswering",
    }
    found = []
    for library in (lora_ref, peft):
        net = getattr(transformers, names[task])(bert().config)
        model = library.get_peft_model(net, library.LoraConfig(r=2, task_type=task))
        model.add_adapter("second", library.LoraConfig(r=2))
        model.set_adapter("second")
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        model.save_pretrained(tmp_path / library.__name__)
        net = getattr(transformers, names[task])(bert().config)
        loaded = library.PeftModel.from_pretrained(net, tmp_path / library.__name__ / "second")
        again = library.PeftModel.from_pretrained(
            getattr(transformers, names[task])(bert().config), tmp_path / library.__name__
        )
        found.append((trains, type(again).__name__))
        assert isinstance(loaded, library.PeftModel) and (library is peft or type(loaded) is type(again))
    assert found[0] == found[1] and any("modules_to_save.second" in name for name in found[0][0])
