"""PeftModel: what `get_peft_model` returns. A LoraModel that can be saved, loaded and printed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.config import LoraConfig
from ..files import adapter_folder
from ..files.adapter_tensors import adapter_tensors, assign
from ..safe.atomic import transaction
from .model import LoraModel


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

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        with transaction(model):
            self.base_model = base = LoraModel(model)
            self.training = model.training
            with transaction(self):  # covers the new modules, too
                base.add_adapter(adapter_name, peft_config, autocast_adapter_dtype)
                base.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        _prepare_gradient_checkpointing(model)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> "PeftModel":
        """The model with an adapter from a folder, active; frozen unless `is_trainable`.

        Raises: FileNotFoundError, ValueError: the folder is not there, broken, or does not fit; the model is unchanged.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        with transaction(model):
            self.base_model = LoraModel(model)
            self.training = model.training
            with transaction(self):  # covers the new modules, too
                self.load_adapter(model_id, adapter_name, is_trainable, autocast_adapter_dtype)
                self.set_adapter(adapter_name, inference_mode=not is_trainable)
        _prepare_gradient_checkpointing(model)
        return self

    def get_base_model(self) -> nn.Module:
        """The base model, with the adapted layers in it."""
        return self.base_model.model

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, autocast_adapter_dtype: bool = True
    ) -> None:
        """Add an adapter from a folder, inactive and frozen.

        Raises: FileNotFoundError, ValueError: the folder is not there, broken, or does not fit, or there is an adapter
        of that name; the model is unchanged.
        Differs from PEFT: a tensor that is missing or left over, or a shape that differs, is an error; a pickle (.bin)
        is not read; a name in use is not overwritten.
        """
        adapter_folder.load_adapter(self.base_model, model_id, adapter_name, is_trainable, autocast_adapter_dtype)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: str | Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool | None = None,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        convert: bool = True,
    ) -> None:
        """Write adapters in PEFT's format: "default" into the folder, others into folders of their names in it.

        The folder fits the ORIGINAL base model: an adapter with a D0 (PiSSA, OLoRA, ...) is written as a plain one, see
        `lora_ref.files.conversion`. With convert=False its factors are written as they are, which is right on the
        changed base weight only. `path_initial_model_for_weight_conversion` is for PEFT's scripts and changes nothing.
        Only the main process writes (default: rank 0). Every rank of a sharded model has to call this.
        Raises: ValueError: an unknown adapter, or safe_serialization=False (pickles are never written); OSError.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization=False would write a pickle: only safetensors is written")
        selected = self.peft_config if selected_adapters is None else self._names_or_active(selected_adapters)
        for name in dict.fromkeys(selected):
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            adapter_folder.save_adapter(self.base_model, name, folder, save_embedding_layers, convert, is_main_process)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward. With adapter_names, sample i uses adapter_names[i] ("__base__": none)."""
        with self.mixed_batch(adapter_names):
            return self.base_model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, with adapter_names as in `forward`: one name a prompt, whatever the beams."""
        base: Any = self.get_base_model()
        settings = kwargs.get("generation_config") or getattr(base, "generation_config", None)
        beams = kwargs.get("num_beams") or getattr(settings, "num_beams", None) or 1
        with self.mixed_batch(adapter_names and [name for name in adapter_names for _ in range(beams)]):
            return base.generate(*args, **kwargs)

    def mixed_batch(self, adapter_names: Sequence[str] | None) -> AbstractContextManager[None]:
        """See `LoraModel.mixed_batch`. None: every sample uses the active adapters."""
        return nullcontext() if adapter_names is None else self.base_model.mixed_batch(adapter_names)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that train, numbers in all), adapters included."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many."""
        trainable, total = self.get_nb_trainable_parameters()
        share = f"{100 * trainable / total:.4f}"
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or name.startswith("__"):  # not set yet: being made or unpickled
                raise
            return getattr(self.base_model, name)

    def __repr__(self) -> str:
        trainable, total = self.get_nb_trainable_parameters()
        layers = self.base_model.layers().values()
        lines = [f"PeftModel({type(self.get_base_model()).__name__}, {total:,d} parameters, {trainable:,d} trainable)"]
        for name, config in self.peft_config.items():
            adapted = [layer for layer in layers if name in layer.adapters()]
            state = ["active"] * (name in self.active_adapters)
            state += ["merged"] * any(name in layer.merged_adapters for layer in adapted)
            flags = f" [{', '.join(state)}]" if state else ""
            lines.append(f"  {name}{flags}: {len(adapted)} layers, r={config.r}, lora_alpha={config.lora_alpha:g}")
        return "\n".join(lines)


def get_peft_model(
    model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", autocast_adapter_dtype: bool = True
) -> PeftModel:
    """Adapt a model in place and return it wrapped; only the adapter trains.

    Raises: ValueError: nothing is targeted, or something cannot be adapted as asked: the model is unchanged.
    """
    if isinstance(model, PeftModel):
        raise ValueError("the model is adapted already: use its add_adapter")
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)


def get_peft_model_state_dict(model: PeftModel, *, adapter_name: str = "default") -> dict[str, Tensor]:
    """{key as in the adapter file: live tensor} of one adapter."""
    model.base_model._check_known(adapter_name)
    return {key: slot.tensor.detach() for key, slot in adapter_tensors(model.base_model, adapter_name).items()}


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: dict[str, Tensor], adapter_name: str = "default"
) -> None:
    """The inverse of `get_peft_model_state_dict`: all tensors are checked before the first is written."""
    model.base_model._check_known(adapter_name)
    assign(model.base_model, adapter_name, dict(peft_model_state_dict))


def _prepare_gradient_checkpointing(model: Any) -> None:
    """Reentrant checkpointing drops all gradients unless some input of a block wants one."""
    # transformers renamed its flag; the older name, where both are there, only warns
    flags = [f for f in ("is_activation_checkpointing", "is_gradient_checkpointing") if hasattr(type(model), f)]
    if flags and getattr(model, flags[0]) and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
