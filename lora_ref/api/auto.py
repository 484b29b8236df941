"""AutoPeftModel: the base model and an adapter from one local folder, which says what the base model is."""

import importlib
from pathlib import Path
from typing import Any, ClassVar

from ..files.adapter_tensors import ends_of
from ..files.config_file import LoraConfig
from .peft_model import BY_TASK, PeftModel


def transformers() -> Any:
    """The library, which only these classes need. ImportError: it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"AutoPeftModel loads the base model with transformers: pip install transformers ({error})"
        ) from error


class AutoPeftModel:
    """Load the base model that adapter_config.json names, then the adapter.

    Source: PEFT's classes of these names.
    Differs from PEFT: adapters are read from local folders only; the base model is loaded by transformers.
    """

    auto_class: ClassVar[str | None] = None  # of transformers. None: the class that the base model was saved with
    task_type: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is not made itself: call {type(self).__name__}.from_pretrained(folder)")

    @classmethod
    def class_of(cls, name: str, revision: str | None) -> Any:
        """The class of transformers that loads the base model."""
        if cls.auto_class:
            return getattr(transformers(), cls.auto_class)
        saved = transformers().AutoConfig.from_pretrained(name, revision=revision)
        return getattr(transformers(), (saved.architectures or ["AutoModel"])[0])

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The adapter's base model with the adapter on it. `kwargs` go to transformers' from_pretrained.

        A tokenizer in the folder that has more tokens than the embeddings have rows grows them. `subfolder`: the
        adapter's folder is this one in the first argument.
        Raises: ValueError: the folder names no base model, or one for another task; FileNotFoundError, ImportError.
        """
        folder = Path(pretrained_model_name_or_path) / (kwargs.pop("subfolder", None) or "")
        found = config or LoraConfig.from_pretrained(folder)
        name = found.base_model_name_or_path
        if not name:
            raise ValueError(f"{folder}: base_model_name_or_path is empty: load the base model, then PeftModel")
        if cls.task_type and found.task_type not in (None, cls.task_type):
            raise ValueError(f"{folder}: task_type={found.task_type!r}, but {cls.__name__} is for {cls.task_type!r}")
        kwargs["revision"] = revision or found.revision
        base = cls.class_of(name, kwargs["revision"]).from_pretrained(name, **kwargs)
        if any((folder / file).exists() for file in ("tokenizer_config.json", "tokenizer.json")):
            tokens = len(transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True))
            ends = ends_of(base)  # many models pad theirs: their rows beyond the tokenizer's stay
            if ends and tokens > ends[0].weight.shape[0]:
                base.resize_token_embeddings(tokens)
        made = BY_TASK.get(cls.task_type, PeftModel)
        return made.from_pretrained(base, folder, adapter_name, is_trainable, config=config)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """See AutoPeftModel."""

    auto_class, task_type = "AutoModelForCausalLM", "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """See AutoPeftModel."""

    auto_class, task_type = "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """See AutoPeftModel."""

    auto_class, task_type = "AutoModelForSequenceClassification", "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """See AutoPeftModel."""

    auto_class, task_type = "AutoModelForTokenClassification", "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """See AutoPeftModel."""

    auto_class, task_type = "AutoModelForQuestionAnswering", "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """See AutoPeftModel."""

    auto_class, task_type = "AutoModel", "FEATURE_EXTRACTION"
