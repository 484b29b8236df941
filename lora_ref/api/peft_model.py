"""PeftModel: what `get_peft_model` returns. A LoraModel that can be saved, loaded and printed."""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..core.adapter_modules import AdapterModule
from ..core.config import LoraConfig
from ..core.layer import InitOf
from ..files import adapter_folder
from ..files.adapter_tensors import ends_of
from ..files.config_file import HUB
from ..safe.atomic import transaction
from ..safe.strict import did_you_mean, levels_to_the_caller
from .model import LoraModel
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status

# arguments of PEFT's and transformers' save_pretrained that change nothing in one local folder
SAVING = (
    *("save_function", "max_shard_size", "push_to_hub", "variant", "repo_id", "commit_message", "private"),
    *("create_pr", "commit_description", "tags", "save_peft_format", "save_original_format"),
)


class OfPrompts(tuple[str, ...]):
    """The adapter of each prompt. Beams and returned sequences give a prompt several rows, one after the other.

    >>> OfPrompts(["a", "b"])(4)
    ['a', 'a', 'b', 'b']
    """

    def __call__(self, rows: int) -> list[str]:
        return [name for name in self for _ in range(max(rows // len(self), 1))]


def check_one_for_each(adapter_names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any], own: str) -> None:
    """ValueError if there is not one name for each prompt. `own` is the base model's name of its input."""
    found = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds", own))]
    prompts = [x.shape[0] for x in found if isinstance(x, Tensor) and x.ndim]
    if prompts and prompts[0] != len(adapter_names):
        raise ValueError(f"adapter_names has {len(adapter_names)} names for {prompts[0]} prompts: give one for each")


class LoadResult(NamedTuple):
    """What a load left over: nothing, but in `set_base_model_state_dict` without `strict`. Elsewhere it is an error."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class PeftModel(nn.Module):
    """An adapted model. What is not defined here is `LoraModel`'s, and what is not there the base model's.

    Source: PEFT's PeftModel, whose names, arguments and file format these are.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))
    >>> model.print_trainable_parameters()
    trainable params: 44 || all params: 102 || trainable%: 43.1373
    >>> [name for name, p in model.named_parameters() if p.requires_grad][0]
    'base_model.model.0.lora_A.default.weight'
    """

    task_type: ClassVar[str | None] = None  # of the classes for one task: what a configuration without one gets

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        peft_config = self._with_task(peft_config)
        with transaction(model):
            self.base_model = base = LoraModel(model)
            self.training = model.training
            with transaction(self):  # covers the new modules, too
                base.add_adapter(adapter_name, peft_config, low_cpu_mem_usage, autocast_adapter_dtype)
                base.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        _prepare_gradient_checkpointing(model)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: LoraConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        **kwargs: Any,
    ) -> "PeftModel":
        """The model with an adapter from a folder, active; frozen and in evaluation mode unless `is_trainable`.

        `config` replaces the file's configuration. The other arguments are those of `load_adapter`.
        Raises: FileNotFoundError, ValueError: the folder is not there, broken, or does not fit; the model is unchanged.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        with transaction(model):
            self.base_model = LoraModel(model)
            self.training = model.training
            with transaction(self):  # covers the new modules, too
                self.load_adapter(
                    model_id,
                    adapter_name,
                    is_trainable,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    ephemeral_gpu_offload=ephemeral_gpu_offload,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    key_mapping=key_mapping,
                    config=config,
                    **kwargs,
                )
                self.set_adapter(adapter_name, inference_mode=not is_trainable)
        if cls is PeftModel:  # as get_peft_model, which class it is depends on the task
            self.__class__ = BY_TASK.get(self.peft_config[adapter_name].task_type, cls)
        _prepare_gradient_checkpointing(model)
        return self

    def _with_task(self, peft_config: LoraConfig) -> LoraConfig:
        """The configuration, which has the task of this class if it names none: then the head is saved, too."""
        if not self.task_type or not isinstance(peft_config, LoraConfig) or peft_config.task_type is not None:
            return peft_config
        return dataclasses.replace(peft_config, task_type=self.task_type)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: LoraConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        init: InitOf = None,
    ) -> None:
        """As `LoraModel.add_adapter`. In a model for one task, each adapter saves the head."""
        given = self._with_task(peft_config)
        self.base_model.add_adapter(adapter_name, given, low_cpu_mem_usage, autocast_adapter_dtype, init=init)

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapted layers in it."""
        return self.base_model.model

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        config: LoraConfig | None = None,
        subfolder: str | None = None,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> LoadResult:
        """Add an adapter from a folder, inactive. Without `is_trainable` it is frozen, and the model evaluates.

        Args:
            key_mapping: {regular expression: replacement} for the tensors' names without "base_model.model.". The
                first that matches counts.
            config: replaces the file's configuration.
            subfolder: the folder is this one in `model_id`.
            ignore_mismatched_sizes: a tensor of another shape stays as `init_lora_weights` makes it, with a warning.
            torch_device, low_cpu_mem_usage, and those of `HUB`: for PEFT's scripts. They change no result.
        Raises: TypeError: an unknown argument. FileNotFoundError, ValueError: the folder is not there, broken, or does
        not fit, or there is an adapter of that name; the model is unchanged.
        Differs from PEFT: a tensor that is missing or left over, or a shape that differs, is an error; a pickle (.bin)
        is not read; a name in use is not overwritten.
        """
        if ephemeral_gpu_offload:
            raise ValueError("ephemeral_gpu_offload=True is not supported: move the model to the device that computes")
        if unknown := [name for name in kwargs if name not in HUB]:
            raise TypeError(f"load_adapter has no argument {unknown[0]!r}{did_you_mean(unknown[0], LOAD_ARGUMENTS)}")
        folder = Path(model_id) / (subfolder or "")
        options = (adapter_name, is_trainable, autocast_adapter_dtype, config, key_mapping, ignore_mismatched_sizes)
        with transaction(self):
            adapter_folder.load_adapter(self.base_model, folder, *options)
            if is_trainable:
                self.base_model.set_requires_grad(adapter_name)
            else:
                self.eval()
        return LoadResult([], [])

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: str | Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool | None = None,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        *,
        convert: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters in PEFT's format: "default" into the folder, others into folders of their names in it.

        The folder fits the ORIGINAL base model: an adapter with a D0 (PiSSA, OLoRA, ...) is written as a plain one, see
        `lora_ref.files.conversion`. With convert=False its factors are written as they are, which is right on the
        changed base weight only. `path_initial_model_for_weight_conversion` is for PEFT's scripts and changes nothing.
        Only the main process writes (default: rank 0). Every rank of a sharded model has to call this, or give a
        gathered `state_dict` of this model, whose tensors are written. `kwargs` are those of `HUB` and `SAVING`, which
        change nothing.
        Raises: ValueError: an unknown adapter, safe_serialization=False (pickles are never written), push_to_hub, or
        `state_dict` lacks a tensor; TypeError: an unknown argument; OSError.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub=True is not supported: save the folder, and call huggingface_hub.upload_folder"
            )
        if unknown := [name for name in kwargs if name not in (*HUB, *SAVING)]:
            hint = did_you_mean(unknown[0], inspect.signature(PeftModel.save_pretrained).parameters)
            raise TypeError(f"save_pretrained has no argument {unknown[0]!r}{hint}")
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: only safetensors is written")
        selected = self.peft_config if selected_adapters is None else self._names_or_active(selected_adapters)
        if selected_adapters is not None and not selected:
            raise ValueError(f"selected_adapters={selected_adapters!r}: name an adapter, or None for all")
        for name in dict.fromkeys(selected):
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            options = (save_embedding_layers, convert, is_main_process, state_dict)
            adapter_folder.save_adapter(self.base_model, name, folder, *options)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward. With adapter_names, sample i uses adapter_names[i] ("__base__": none)."""
        with self.mixed_batch(adapter_names):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with adapter_names as in `forward`: one name a prompt, whatever the beams.

        Raises: ValueError: not one name for each prompt.
        """
        base: Any = self.get_base_model()
        if adapter_names is not None:
            check_one_for_each(adapter_names, args, kwargs, getattr(base, "main_input_name", "input_ids"))
        with self.mixed_batch(None if adapter_names is None else OfPrompts(adapter_names)):
            return base.generate(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's. ValueError: an adapter is on the embeddings, whose shapes would not follow."""
        base: Any = self.get_base_model()
        if any(isinstance(end, AdapterModule) for end in ends_of(base)):
            why = "an adapter is on the input or the output embeddings, and would not fit the new ones"
            raise ValueError(f"{why}: resize the base model first, then add the adapter")
        return base.resize_token_embeddings(*args, **kwargs)

    def mixed_batch(self, adapter_names: Sequence[str] | None) -> AbstractContextManager[None]:
        """See `LoraModel.mixed_batch`. None: every sample uses the active adapters."""
        return nullcontext() if adapter_names is None else self.base_model.mixed_batch(adapter_names)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """See `lora_ref.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """See `lora_ref.get_model_status`."""
        return get_model_status(self)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let the inputs of a base model require gradients, where it checkpoints its activations."""
        _prepare_gradient_checkpointing(model)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that train, numbers in all), adapters included."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        share = f"{100 * trainable / total:.4f}"
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}")

    @property
    def modules_to_save(self) -> set[str] | None:
        """The names of the modules that some adapter saves whole, as configured; None without any."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):  # not set yet: being made or unpickled
                raise
            return getattr(self.base_model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the base model has is set there (`generation_config`, ...), and what LoraModel has, in LoraModel."""
        if name in vars(self) or hasattr(type(self), name) or not isinstance(here := vars(self).get("_modules"), dict):
            return super().__setattr__(name, value)
        adapted: Any = here.get("base_model")
        if adapted is None or name.startswith("_") or name == "base_model":
            return super().__setattr__(name, value)
        if name in ("active_adapter", "active_adapters"):
            raise AttributeError(f"{name} cannot be assigned: call set_adapter({value!r})")
        if name in vars(adapted) or name in adapted._modules or hasattr(type(adapted), name):
            return setattr(adapted, name, value)
        has_it = hasattr(adapted.model, name)
        return setattr(adapted.model, name, value) if has_it else super().__setattr__(name, value)

    def __repr__(self) -> str:
        trainable, total = self.get_nb_trainable_parameters()
        layers = self.base_model.lora_layers().values()
        names = f"{type(self).__name__}({type(self.get_base_model()).__name__}"
        lines = [f"{names}, {total:,d} parameters, {trainable:,d} trainable)"]
        for name, config in self.peft_config.items():
            adapted = [layer for layer in layers if name in layer.adapters()]
            state = ["active"] * (name in self.active_adapters)
            state += ["merged"] * any(name in layer.merged_adapters for layer in adapted)
            flags = f" [{', '.join(state)}]" if state else ""
            lines.append(f"  {name}{flags}: {len(adapted)} layers, r={config.r}, lora_alpha={config.lora_alpha:g}")
        return "\n".join(lines)


class PeftModelForSequenceClassification(PeftModel):
    """PeftModel for task_type="SEQ_CLS": `classifier` and `score` are saved with the adapter."""

    task_type = "SEQ_CLS"


class PeftModelForTokenClassification(PeftModel):
    """PeftModel for task_type="TOKEN_CLS": `classifier` and `score` are saved with the adapter."""

    task_type = "TOKEN_CLS"


class PeftModelForQuestionAnswering(PeftModel):
    """PeftModel for task_type="QUESTION_ANS": `qa_outputs` is saved with the adapter."""

    task_type = "QUESTION_ANS"


class PeftModelForCausalLM(PeftModel):
    """PeftModel for task_type="CAUSAL_LM"."""

    task_type = "CAUSAL_LM"


class PeftModelForSeq2SeqLM(PeftModel):
    """PeftModel for task_type="SEQ_2_SEQ_LM"."""

    task_type = "SEQ_2_SEQ_LM"


class PeftModelForFeatureExtraction(PeftModel):
    """PeftModel for task_type="FEATURE_EXTRACTION"."""

    task_type = "FEATURE_EXTRACTION"


BY_TASK: dict[str | None, type[PeftModel]] = {cls.task_type: cls for cls in PeftModel.__subclasses__()}


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adapt a model in place and return it wrapped; only the adapter trains.

    `revision` of the base model is noted in the configuration, in place of another one with a warning.
    `low_cpu_mem_usage` is as in `LoraModel.add_adapter`.
    Raises: ValueError: nothing is targeted, or something cannot be adapted as asked: the model is unchanged.
    """
    if isinstance(model, PeftModel):
        raise ValueError("the model is adapted already: use its add_adapter")
    if not isinstance(peft_config, LoraConfig):
        raise TypeError(f"peft_config is a {type(peft_config).__name__}: a lora_ref.LoraConfig is needed")
    if mixed:
        raise ValueError("mixed=True mixes kinds of adapters, and LoRA is the only one here: leave it out")
    if revision is not None:
        if peft_config.revision not in (None, revision):
            note = f"revision={revision!r} takes the place of the configuration's {peft_config.revision!r}"
            warnings.warn(note, stacklevel=levels_to_the_caller())
        peft_config = dataclasses.replace(peft_config, revision=revision)
    made = BY_TASK.get(peft_config.task_type, PeftModel)
    return made(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _prepare_gradient_checkpointing(model: Any) -> None:
    """Reentrant checkpointing drops all gradients unless some input of a block wants one."""
    # transformers renamed its flag; the older name, where both are there, only warns
    flags = [f for f in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(type(model), f)]
    with suppress(Exception):  # a model without input embeddings, or of whatever foreign class
        if flags and getattr(model, flags[0]) and hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()


LOAD_ARGUMENTS = [*inspect.signature(PeftModel.load_adapter).parameters, *HUB]
