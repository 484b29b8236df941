"""A batch that mixes adapters, over the base model's forward pass: it should cost what its samples cost."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .measure import Bar, Case, Job
from .steps import LIBRARIES

R = 8


def cases(options: Any) -> Iterator[Case]:
    """Eight samples of 64 tokens with 8 adapters each their own; then with 32 loaded; then all samples with one."""
    width, tokens = (64, 4) if options.tiny else (768, 64)
    yield case(8, 8, width, tokens, options)
    if not options.quick:
        yield case(8, 32, width, tokens, options)
        yield case(1, 8, width, tokens, options)


def case(used: int, loaded: int, width: int, tokens: int, options: Any) -> Case:
    """8 samples, `used` adapters of `loaded` among them."""
    torch.manual_seed(0)
    x = torch.randn(8, tokens, width, device=options.device)
    net = nn.Sequential(*[nn.Linear(width, width, device=options.device) for _ in range(4)]).requires_grad_(False)
    names = [f"a{i % used}" for i in range(8)]

    def mixed(library: Any) -> Job:
        config = library.LoraConfig(r=R, lora_alpha=R, target_modules=["0", "1", "2", "3"])
        own = nn.Sequential(*net)  # the layers are shared, their places are not
        model = library.get_peft_model(own, config, adapter_name="a0")
        for i in range(1, loaded):
            model.add_adapter(f"a{i}", config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.02)
        return partial(call, model.eval(), x, adapter_names=names)

    jobs: dict[str, Callable[[], Job]] = {"frozen": lambda: partial(call, net, x)}
    jobs |= {name: partial(mixed, library) for name, library in LIBRARIES.items()}
    return Case(
        theme="A batch that mixes adapters",
        about={"samples": 8, "adapters used": used, "loaded": loaded, "layers": f"4 x {width}->{width}", "r": R},
        jobs=jobs,
        floor="frozen",
        bars=[Bar("mixed batch, 8 samples: time / base's", lambda row: row["ratios"]["lora_ref"]["median"], 1.3)],
    )


@torch.no_grad()
def call(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return model(x, **options)
