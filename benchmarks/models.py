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
from lora_ref.formula import add_in_place

from .measure import Bar, Case, Job
from .steps import LIBRARIES, overhead

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
        """The measured floor: a frozen model, and then the products of every branch in their fastest orientation.

        As with adapters, the gradient runs back to the outputs of the first layers, which the adapters' need, and not
        to their inputs, which nothing needs: that saves a product of the frozen layers.
        """
        factors = {
            name: layer.factors(layer.active_adapters[0]) for name, layer in adapted(lora_ref).args[0].layers().items()
        }
        frozen = plain(None)
        sizes = {(A.shape[1], B.shape[0]) for A, B in factors.values()}
        data = {
            (n_in, n_out): [torch.randn(batch * tokens, n, device=options.device) for n in (n_in, n_out, n_out, n_in)]
            for n_in, n_out in sizes
        }
        goes_on: dict[str, bool] = {}  # back beyond this layer

        def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            goes_on[name] = inputs[0].requires_grad
            return output if output.requires_grad else output.requires_grad_()

        for name in factors:
            frozen.args[0].get_submodule(name).register_forward_hook(partial(hook, name))

        def job(model: nn.Module) -> None:
            frozen()
            with torch.no_grad():
                for name, (A, B) in factors.items():
                    x, y, g, dx = data[A.shape[1], B.shape[0]]
                    z, dz = A @ x.T, B.T @ g.T
                    dB, dA = z @ g, dz @ x
                    add_in_place(y, z.T, B.T)
                    if goes_on[name]:
                        add_in_place(dx, dz.T, A)
                    del dA, dB

        return partial(job, frozen.args[0])

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


def flops(job: Job) -> int:
    with FlopCounterMode(display=False) as counter:
        job()
    return counter.get_total_flops()


def forward_backward(model: nn.Module, ids: Tensor, held: list[nn.Parameter]) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    for parameter in held:
        parameter.grad = None
