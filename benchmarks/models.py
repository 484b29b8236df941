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
    layers, width, tokens = (1, 32, 8) if options.tiny else (2, 256, 64) if options.quick else (2, 768, 128)
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
    """In all but full fine-tuning the gradient runs back to the embeddings' output, as with gradient checkpointing.

    Else it would end at the first adapters, and an adapted model do three products fewer of the frozen layers than the
    frozen one does.
    """
    torch.manual_seed(0)
    ids = torch.randint(512, (batch, tokens), device=options.device)

    def plain(trains: bool) -> nn.Module:
        """All parameters train, or none."""
        torch.manual_seed(0)
        model = make().to(options.device).train().requires_grad_(trains)
        if not trains:
            model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        return model

    def adapted(library: Any) -> Any:
        config = library.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear", task_type="CAUSAL_LM")
        return library.get_peft_model(plain(False), config)

    def bare() -> nn.Module:
        """The measured floor: the plain model, each of its linear layers with its branch in one autograd function."""
        model = plain(False)
        for name, layer in adapted(lora_ref).lora_layers().items():
            module, (A, B) = model.get_submodule(name), layer.factors(layer.active_adapters[0])
            module.A, module.B = A, B
            module.forward = partial(with_branch, layer.logical(module.weight), module.bias, A, B)
        return model

    def step(make: Callable[[], nn.Module]) -> Callable[[], Job]:
        def prepare() -> Job:
            model = make()
            return partial(forward_backward, model, ids, list(model.parameters()))

        return prepare

    def at_the_same_speed(seconds: float) -> dict[str, float]:
        """The step's FLOPs over the frozen one's: the ratio, if the branches run at the frozen model's FLOP/s."""
        best = flops(jobs["lora_ref"]()) / flops(jobs["frozen"]())
        return dict.fromkeys(["bare", *LIBRARIES], best)

    models = {"frozen": partial(plain, False), "full": partial(plain, True), "bare": bare}
    models |= {library: partial(adapted, module) for library, module in LIBRARIES.items()}
    jobs = {name: step(model) for name, model in models.items()}
    return Case(
        theme="Training step of a whole model, all-linear, r=16",
        about={"model": name, "layers": 1 if options.tiny else 2, "tokens": batch * tokens},
        jobs=jobs,
        floor="frozen",
        least=25,  # a branch takes a few hundredths of the step
        bytes=True,
        alive=lambda job: job.args[0].parameters(),
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
