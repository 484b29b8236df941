"""A batch that mixes adapters, over the base model's forward pass: it should cost what its samples cost."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .measure import Bar, Case, Job
from .steps import LIBRARIES

R = 8
LAYERS = 4


def cases(options: Any) -> Iterator[Case]:
    """Eight samples with an adapter each, long and of one token; then one adapter for all of them."""
    width, tokens = (64, 4) if options.tiny else (768, 64)
    yield case(8, width, tokens, options)
    if not options.quick:
        yield case(8, width, 1, options)
        yield case(1, width, tokens, options)


def case(used: int, width: int, tokens: int, options: Any) -> Case:
    """8 samples, `used` adapters among them, of 8 that are loaded, or of 32."""
    torch.manual_seed(0)
    x = torch.randn(8, tokens, width, device=options.device)
    net = nn.Sequential(*[nn.Linear(width, width, device=options.device) for _ in range(LAYERS)]).requires_grad_(False)
    names = [f"a{i % used}" for i in range(8)]

    def mixed(library: Any, loaded: int) -> Job:
        config = library.LoraConfig(r=R, lora_alpha=R, target_modules=[str(i) for i in range(LAYERS)])
        own = nn.Sequential(*net)  # the layers are shared, their places are not
        model = library.get_peft_model(own, config, adapter_name="a0")
        for i in range(1, loaded):
            model.add_adapter(f"a{i}", config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.02)
        return partial(call, model.eval(), x, adapter_names=names)

    @torch.no_grad()
    def products(layers: list[tuple[nn.Linear, list[Tensor], list[Tensor]]]) -> Tensor:
        y = x
        for linear, As, Bs in layers:
            z = y @ torch.stack(As).mT  # (8, tokens, in) @ (8, in, r) -> (8, tokens, r)
            y = linear(y).baddbmm_(z, torch.stack(Bs).mT)  # (8, tokens, r) @ (8, r, out) -> (8, tokens, out)
        return y

    def bare() -> Job:
        """The measured floor: each sample's factors, known beforehand, in a stack, and two products."""

        def chosen(*shape: int) -> list[Tensor]:
            made = [torch.randn(shape, device=options.device) for _ in range(used)]
            return [made[i % used] for i in range(8)]

        return partial(products, [(linear, chosen(R, width), chosen(width, R)) for linear in net])

    jobs: dict[str, Callable[[], Job]] = {"frozen": lambda: partial(call, net, x), "bare": bare}
    for loaded in (8, 32):
        jobs |= {f"{name} {loaded} loaded": partial(mixed, library, loaded) for name, library in LIBRARIES.items()}
    bars = [
        Bar(
            "mixed batch, 8 samples: time / base's",
            lambda row: row["ratios"]["lora_ref 8 loaded"]["median"],
            1.3,
            lambda row: row["ratios"]["bare"]["median"],
        ),
        Bar("mixed batch: time with 32 adapters loaded / with 8", growth, 1.1),
    ]
    return Case(
        theme="A batch that mixes adapters",
        about={"samples": 8, "tokens": tokens, "used": used, "layers": f"{LAYERS} x {width}->{width}", "r": R},
        jobs=jobs,
        floor="frozen",
        computed=lambda seconds: dict.fromkeys(["bare", "loaded"], 1 + R * 2 * width / width**2),  # by FLOPs
        bars=bars if tokens > 1 else bars[1:],  # one token: where the base takes no longer than Python
    )


def growth(row: dict[str, Any]) -> float:
    return row["ratios"]["lora_ref 32 loaded"]["median"] / row["ratios"]["lora_ref 8 loaded"]["median"]


@torch.no_grad()
def call(model: nn.Module, x: Tensor, **options: Any) -> Tensor:
    return model(x, **options)
