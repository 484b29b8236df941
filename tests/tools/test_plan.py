"""`lora-ref plan`: its counts are those of real architectures, its operations those that torch counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ref import LoraConfig, get_peft_model
from lora_ref.tools.cli import main
from lora_ref.tools.plan import SHAPES, Shape, memory, nearest_shape, operations

SMALL = Shape(layers=3, hidden=64, intermediate=160, kv=32, vocab=100)


def llama(shape: Shape, head: int, device: str = "meta", dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // head,
        num_key_value_heads=shape.kv // head,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="eager",
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("size", SHAPES)
def test_weights_and_adapters_are_those_of_the_real_architecture(size: str) -> None:
    shape = SHAPES[size]
    net = llama(shape, head=128)
    assert shape.parameters() == sum(p.numel() for p in net.parameters())
    model = get_peft_model(net, LoraConfig(r=16, target_modules="all-linear"))
    assert shape.adapter(16) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def counted(shape: Shape, tokens: int, full: bool) -> int:
    net = llama(shape, head=16, device="cpu", dtype=torch.float32)
    model = net if full else get_peft_model(net, LoraConfig(r=4, target_modules="all-linear"))
    embedded = torch.randn(1, tokens, shape.hidden, requires_grad=True)  # so that the first block has an input gradient
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("full", [True, False])
def test_operations_are_those_that_torch_counts(full: bool) -> None:
    tokens = 32
    # the eager attention that is counted computes the masked half, too
    want = tokens * operations(SMALL, 4, context=2 * tokens, full=full)
    assert counted(SMALL, tokens, full) == pytest.approx(want, rel=0.01)


def test_checkpointing_keeps_the_input_of_each_block() -> None:
    tokens, sizes = 32, {}
    for layers in (3, 5):
        shape = Shape(layers, *(getattr(SMALL, name) for name in ("hidden", "intermediate", "kv", "vocab")))
        net = llama(shape, head=16, device="cpu")
        net.gradient_checkpointing_enable()
        model = get_peft_model(net, LoraConfig(r=4, target_modules="all-linear")).train()
        kept: dict[int, int] = {}
        owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept, owned: set[int] = owned) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(input_ids=torch.zeros(1, tokens, dtype=torch.long))
        sizes[layers] = sum(kept.values())
        planned = memory(shape, 4, "one process", 1, tokens)["activations"]
        assert sizes[layers] <= planned
    assert sizes[5] - sizes[3] == 2 * tokens * SMALL.hidden * 2


def test_sharding_divides_what_it_says() -> None:
    shape = SHAPES["70B"]
    one, four = (memory(shape, 16, "FSDP2", n, 1024) for n in (1, 4))
    assert four["weights"] * 4 == one["weights"] == 2 * shape.parameters()
    assert four["adapters"] * 4 == one["adapters"] == 16 * shape.adapter(16)
    ddp, alone = memory(shape, 16, "DDP", 8, 1024), memory(shape, 16, "one process", 1, 1024)
    assert ddp == alone
    tensor = memory(shape, 16, "tensor parallel", 2, 1024)
    assert tensor["adapters"] == alone["adapters"] and tensor["weights"] * 2 == alone["weights"]
    for arguments in (("pipeline", 1, 1), ("DDP", 0, 1), ("DDP", 1, 0), ("one process", 2, 1)):
        with pytest.raises(ValueError, match="must be one of one process, DDP"):
            memory(shape, 16, *arguments)


def test_a_size_between_the_published_ones_has_more_blocks() -> None:
    assert [nearest_shape(shape.parameters()) for shape in SHAPES.values()] == list(SHAPES.values())
    assert nearest_shape(13e9).parameters() == pytest.approx(13e9, rel=0.02)
    for size in (0, -1, 1e6, float("nan")):
        with pytest.raises(ValueError, match="must be at least 1"):
            nearest_shape(size)


def test_the_command_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--params", "70e9", "--gpus", "4", "--gpu-memory", "80"]) == 0
    printed = capsys.readouterr().out
    lines = {line.split()[0]: line for line in printed.splitlines() if line.strip()}
    full, ours = (operations(nearest_shape(70e9), 16, 4096, full) for full in (True, False))
    assert f"{ours:.3g}, {ours / full:.2f} of full fine-tuning's" in " ".join(printed.split())
    assert lines["DDP"].split()[-1] == "no" and lines["FSDP2"].split()[-1] == "yes"
    headings = ["engine", "GPUs", "weights", "adapters", "gathered", "kept", "total", "<=", "80"]
    assert lines["engine"].split() == headings
    assert main(["plan", "--params", "1"]) == 1
    assert "must be at least" in capsys.readouterr().err
