"""A training step of whole models: a GPT-2-like and a Llama-like one, random weights, every linear layer adapted."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers import logging as transformers_logging

import lora_ref

from .measure import Bar, Case, Job
from .steps import LIBRARIES, Products, overhead

R = 16


def cases(options: Any) -> Iterator[Case]:
    """One case a model."""
    transformers_logging.set_verbosity_error()  # the small vocabulary has no token to end with, and needs none
    layers, width, tokens = (1, 32, 8) if options.tiny else (2, 256, 64) if options.quick else (4, 768, 128)
    heads, words, batch = width // 32, 512, 4
    gpt2 = GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=words, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    llama = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_attention_heads=heads,
        vocab_size=words,
    )
    yield case("GPT-2-like", partial(GPT2LMHeadModel, gpt2), batch, tokens, options)
    yield case("Llama-like", partial(LlamaForCausalLM, llama), batch, tokens, options)


def case(name: str, make: Callable[[], nn.Module], batch: int, tokens: int, options: Any) -> Case:
    """Frozen: the gradient runs back to the embeddings' output and reaches no parameter.

    (Where adapters are it ends at the first of them, which is a product less, so that a branch can look free.)
    """
    torch.manual_seed(0)
    ids = torch.randint(512, (batch, tokens), device=options.device)

    def plain(trains: bool | None) -> partial[None]:
        """All parameters train; or none, and the gradient runs back to the embeddings' output (None: nowhere)."""
        torch.manual_seed(0)
        model = make().to(options.device).train().requires_grad_(bool(trains))
        if trains is False:
            model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        return partial(forward_backward, model, ids, list(model.parameters()))

    def adapted(library: Any) -> partial[None]:
        torch.manual_seed(0)
        model = make().to(options.device)
        config = library.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", task_type="CAUSAL_LM")
        model = library.get_peft_model(model, config).train()
        return partial(forward_backward, model, ids, list(model.parameters()))

    def bare() -> Job:
        """The measured floor: the plain model, each of its linear layers with its branch in one autograd function."""
        layers, model = adapted(lora_ref).args[0].layers(), plain(None).args[0]
        factors = {name: layer.factors(layer.active_adapters[0]) for name, layer in layers.items()}
        for name, (A, B) in factors.items():
            module = model.get_submodule(name)
            W = layers[name].logical(module.weight)
            module.forward = partial(with_branch, W, module.bias, A.requires_grad_(), B.requires_grad_())
        return partial(forward_backward, model, ids, [p for pair in factors.values() for p in pair])

    def at_the_same_speed(seconds: float) -> dict[str, float]:
        """The step's FLOPs over the frozen one's: the ratio, if the branches run at the frozen model's FLOP/s."""
        best = flops(adapted(lora_ref)) / flops(plain(False))
        return dict.fromkeys(["bare", *LIBRARIES], best)

    jobs: dict[str, Callable[[], Job]] = {"frozen": partial(plain, False), "full": partial(plain, True), "bare": bare}
    jobs |= {library: partial(adapted, module) for library, module in LIBRARIES.items()}
    return Case(
        theme="Training step of a whole model, all-linear, r=16",
        about={"model": name, "layers": 1 if options.tiny else 2 if options.quick else 4, "tokens": batch * tokens},
        jobs=jobs,
        floor="frozen",
        least=11,  # a branch takes a few hundredths of the step
        bytes=True,
        alive=lambda job: [*job.args[0].parameters(), *job.args[2]],
        computed=at_the_same_speed,
        bars=[
            Bar(
                "whole-model step: overhead / PEFT's",
                lambda row: overhead(row, "lora_ref") / overhead(row, "PEFT"),
                0.6,
                lambda row: overhead(row, "bare") / overhead(row, "PEFT"),
            ),
            Bar(
                "whole-model step: peak memory / PEFT's",
                lambda row: row["peak"]["lora_ref"] / row["peak"]["PEFT"],
                1.0,
            ),
        ],
    )


def with_branch(W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return Products.apply(flat, W, b, A, B, 0.0).view(*x.shape[:-1], -1)


def flops(job: Job) -> int:
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def forward_backward(model: nn.Module, ids: Tensor, held: list[nn.Parameter]) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in held:
        parameter.grad = None
