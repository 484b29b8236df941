"""Models of transformers, tiny and random, and what to give them.

A configuration is the class's own with small sizes, see `shrink`. Inputs follow `main_input_name`.
"""

from __future__ import annotations

import inspect
from typing import Any

# the size of what a configuration calls so
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "emb_dim"), 16),
    **dict.fromkeys(("encoder_hidden_size", "decoder_hidden_size", "text_embed_dim", "projection_dim"), 16),
    **dict.fromkeys(("cross_attention_hidden_size", "hidden_dim", "word_embed_proj_dim", "out_hidden_size"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "inner_dim", "d_inner"), 24),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers", "depth", "num_blocks", "encoder_num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 2),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "kv_channels", "attention_head_size", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "kv_lora_rank", "q_lora_rank"), 8),
    **dict.fromkeys(("vocab_size", "text_vocab_size"), 99),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), 64),
    "max_target_positions": 64,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("image_size", "input_size"), 32),
    "patch_size": 8,
    "state_size": 8,
    "mamba_chunk_size": 16,
    "first_k_dense_replace": 1,
    "num_mel_bins": 16,
}


# inputs whose names contain these
KINDS = {
    "text": ("input_ids",),
    "vision": ("pixel_values",),
    "audio": ("input_features", "input_values", "audio_values"),
}


def shrink(config: Any) -> Any:
    """The configuration with small sizes, and those of the configurations in it."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type") or type(value).__name__.endswith("Config"):
            shrink(value)
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > SIZES[name]:
            set_option(config, name, SIZES[name])
        elif name in ("hidden_sizes", "embed_dims", "encoder_hidden_sizes") and isinstance(value, (list, tuple)):
            set_option(config, name, type(value)(8 * (i + 1) for i in range(len(value))))
        elif name == "image_size" and isinstance(value, (list, tuple)):
            set_option(config, name, type(value)(32 for _ in value))
        elif name in ("depths",) and isinstance(value, (list, tuple)):
            set_option(config, name, type(value)(1 for _ in value))
        elif name == "mlp_layer_types" and isinstance(value, (list, tuple)):
            set_option(config, name, [value[0], value[-1]])  # of a mixture of experts a dense layer and one of experts
        elif name == "layer_types" and isinstance(value, (list, tuple)):
            set_option(config, name, list(value)[: SIZES["num_hidden_layers"]])
        elif name.endswith("_token_id") and isinstance(value, int) and value > 90:
            set_option(config, name, 1)
    return config


def set_option(config: Any, name: str, value: Any) -> None:
    """Set it where the class allows that."""
    try:
        setattr(config, name, value)
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return


def build(name: str) -> Any:
    """A tiny model of this class of transformers, with random weights, in evaluation mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    cls = getattr(transformers, name)
    # frozen: kernels that torch chooses for weights without gradients give other last bits
    return awake(cls._from_config(shrink(cls.config_class())).eval().requires_grad_(False))


def awake(model: Any) -> Any:
    """Larger weights in linear layers and convolutions, and larger scales, so that outputs keep the size of inputs.

    With weights of the configuration's 0.02 the signal of a narrow network vanishes: then an adapter changes nothing.
    """
    import torch
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.weight.is_floating_point():
            nn.init.kaiming_normal_(module.weight)
    for parameter in model.parameters():
        scales = parameter.data
        if parameter.ndim == 1 and torch.all((scales > 0) & (scales < 1e-3)):  # of branches that begin small
            scales.fill_(0.5)
    return model


def inputs(model: Any) -> dict[str, Any]:
    """What the model's forward wants, small and random."""
    import torch

    torch.manual_seed(1)
    config, main = model.config, model.main_input_name
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    tokens = torch.randint(3, 90, (2, 6))
    pixels = torch.randn(2, channels, height or 32, width or 32)
    made: dict[str, Any] = {
        "input_ids": tokens,
        "pixel_values": pixels,
        "input_values": torch.randn(2, 1600),
        "input_features": torch.randn(2, getattr(config, "num_mel_bins", 16), 128),
    }
    found = {main: made[main]} if main in made else {}
    names = inspect.signature(model.forward).parameters
    if "pixel_values" in names and main == "input_ids" and type(model).__name__.endswith("Model"):
        found["pixel_values"] = pixels
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        found["decoder_input_ids"] = torch.randint(3, 90, (2, 4))
    return found


def family(name: str) -> str:
    """What a class reads: "text", "vision", "audio", "multimodal" or "other", by the inputs of its forward."""
    import transformers

    cls = getattr(transformers, name)
    names = [given for given in inspect.signature(cls.forward).parameters if not given.startswith("decoder_")]
    found = [kind for kind, words in KINDS.items() if any(word in given for given in names for word in words)]
    return "multimodal" if len(found) > 1 else found[0] if found else "other"
