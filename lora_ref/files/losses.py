"""What a save must not lose: a resized vocabulary, base weights that were trained, layers changed by hand."""

import math
import warnings
from contextlib import suppress
from typing import Any

from ..core.model import LoraModel, biases
from ..safe.strict import levels_to_the_caller
from .adapter_tensors import PREFIX, TensorPlace, embedding_tensors


def vocabulary_was(model: LoraModel) -> int | None:
    """The size of the vocabulary that a reader of the file will have, if it is not the present one: it was resized.

    That is the size in the base model's saved configuration, or without one, the size when the model was adapted.
    """
    base: Any = model.model
    before = saved_vocabulary(base) or getattr(model, "vocabulary_before", None)
    with suppress(Exception):  # no transformers model
        return before if before != base.config.get_text_config().vocab_size else None
    return None


def saved_vocabulary(base: Any) -> int | None:
    """The size of the vocabulary in the configuration that the base model was loaded with, if that is still there."""
    with suppress(Exception):  # no transformers model; a name that is no local folder and not in the hub's cache
        # {} for a folder without one, of which from_pretrained would make one of defaults
        saved, _ = type(base.config).get_config_dict(base.name_or_path, local_files_only=True)
        return type(base.config).from_dict(saved).get_text_config().vocab_size if saved else None
    return None


def warn_of_losses(model: LoraModel, found: dict[str, TensorPlace], adapter_name: str, embeddings: bool | str) -> None:
    """Warn of base weights that a reader of the file will not have, and of embeddings that make it large."""
    ends, notes, resized, base = embedding_tensors(model), [], vocabulary_was(model), model.model
    held = embeddings is False or ends.keys() & found.keys()
    if ends and not held and getattr(base, "name_or_path", None) and not saved_vocabulary(base):
        unknown = f"the configuration of {base.name_or_path!r} cannot be read"
        notes.append(f"{unknown}: if the vocabulary was resized before the adapter, say save_embedding_layers=True")
    if resized is not None and ends:
        lost = [key.removeprefix(PREFIX) for key in ends if key not in found]
        what = f"the vocabulary was resized (it had {resized} tokens)"
        way = "resize the base model, too, before you load the adapter"
        notes.append(f"{what}: the embeddings are saved with the adapter; {way}")
        if lost:
            notes = [f"{what}, but {', '.join(lost)} is not saved: say save_embedding_layers=True"]
    adapters = {id(p) for wrapper in model.adapter_wrappers() for _, p in wrapper.adapter_parameters()}
    trained = [biases(model.model, c.bias, name).values() for name, c in model.peft_config.items()]
    known = adapters | {id(bias) for found_biases in trained for bias in found_biases}
    known |= {id(slot.owner._parameters.get(slot.attribute)) for slot in found.values()}
    open_ones = [name for name, p in model.model.named_parameters() if p.requires_grad and id(p) not in known]
    if open_ones:
        named = ", ".join(open_ones[:3] + ["..."] * (len(open_ones) > 3))
        what = f"{len(open_ones)} parameters of the base model require gradients ({named})"
        notes.append(f"{what}, and the file of adapter {adapter_name!r} does not hold them: use modules_to_save")
    for note in notes:
        warnings.warn(note, stacklevel=levels_to_the_caller())


def ends_to_save(model: LoraModel, adapter_name: str, embeddings: bool | str) -> dict[str, TensorPlace]:
    """The base weights of the input and output embeddings that go into the file of an adapter.

    "auto": those that the adapter targets by their bare names, PEFT's rule, or both, if the vocabulary was resized.
    Raises: ValueError: a value that is not True, False or "auto".
    """
    if embeddings not in (True, False, "auto"):
        raise ValueError(f"save_embedding_layers={embeddings!r}: must be True, False or 'auto'")
    targets = model.peft_config[adapter_name].target_modules
    names = list(targets or [])
    if isinstance(targets, str):  # a pattern: the last parts of the names that it reached
        layers = model.lora_layers().items()
        names = [name.rpartition(".")[2] for name, layer in layers if adapter_name in layer.adapters()]
    targeted, resized = "embed_tokens" in names or "lm_head" in names, vocabulary_was(model) is not None
    if embeddings is False or not (embeddings is True or targeted or resized):
        return {}
    # where embeddings are targeted, those that are adapted; else, or if they were resized, both
    ends = embedding_tensors(model).items()
    return {key: slot for key, slot in ends if resized or not targeted or ".base_layer." in key}


def check_as_configured(model: LoraModel, adapter_name: str) -> None:
    """ValueError if the layers hold another adapter than its configuration describes: nobody could read the folder."""
    config = model.peft_config[adapter_name]
    layers = {where: layer for where, layer in model.lora_layers().items() if adapter_name in layer.r}
    decided = {match.name: match for match in model.targeting(config).matches if match.action.startswith("adapt")}
    if apart := sorted(layers.keys() ^ decided.keys()):
        holds = "is adapted" if apart[0] in layers else "is not adapted"
        raise ValueError(f"{apart[0]} {holds}, but the configuration of {adapter_name!r} says otherwise: undo that")
    for where, layer in layers.items():
        match, s = decided[where], layer.initial_scaling[adapter_name]
        A, B = (getattr(owner, own).shape for owner, own in layer.stored_in(adapter_name).values())
        n_out, n_in = layer.logical(layer.unmerged_weight).shape[-2:]
        if (math.prod(A[1:]), B[0]) != (n_in, n_out):
            holds = f"holds factors for {math.prod(A[1:])} inputs and {B[0]} outputs"
            raise ValueError(f"{where} {holds}, but the layer has {n_in} and {n_out}: do not replace factors by hand")
        experts = layer.base_weight.shape[0] if layer.kind == "parameter" and layer.base_weight.ndim == 3 else 1
        ranks = {A[0] // experts, B[1] * layer.groups // experts, layer.r[adapter_name]}
        if ranks != {match.r} or s != match.scaling:
            holds = f"holds factors of rank {max(ranks)} and s={s:g}"
            given = f"the configuration of {adapter_name!r} gives r={match.r} and s={match.scaling:g}"
            raise ValueError(f"{where} {holds}, but {given}: change neither by hand, and add a new adapter instead")
