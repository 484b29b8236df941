"""The same seed gives the same numbers: again, after other draws, on other numbers of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lora_ref import (
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from lora_ref.fast import linear as fused
from lora_ref.init import METHODS
from spec_tests import agree

DRAWN = ["True", "False", "gaussian", "orthogonal"]  # from torch's own generator, which torch.manual_seed seeds
FROM_WEIGHT = ["pissa", "pissa_niter_2", "olora", "loftq", "mica", "corda", "eva", "lora_ga"]
WIDTH = 320  # wide enough for Lanczos, and for torch to share products out among threads
Numbers = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.use_deterministic_algorithms(False)


def base(dtype: torch.dtype) -> nn.Module:
    """Weights whose singular values are apart, so that rounding cannot turn the vectors."""
    rng, net = np.random.default_rng(0), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 64))
    for layer in (net[0], net[2]):
        m = min(layer.weight.shape)
        (U, _), (V, _) = (np.linalg.qr(rng.standard_normal((n, m))) for n in layer.weight.shape)
        layer.weight.data = torch.from_numpy((U * np.linspace(1, 0.1, m)) @ V.T)
        layer.bias.data.zero_()
    return net.to(dtype)


def batches(dtype: torch.dtype) -> list[Tensor]:
    rng, spread = np.random.default_rng(1), 0.8 ** np.arange(WIDTH)
    return [torch.from_numpy(rng.standard_normal((400, WIDTH)) * spread).to(dtype) for _ in range(3)]


def adapted(name: str, dtype: torch.dtype, **options: Any) -> PeftModel:
    net, data = base(dtype), batches(dtype)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["0", "2"],
        init_lora_weights={"True": True, "False": False}.get(name, name),
        loftq_config=LoftQConfig(loftq_iter=2) if name == "loftq" else None,
        eva_config=EvaConfig(rho=1.5) if name == "eva" else None,
        **options,
    )
    if name == "corda":
        preprocess_corda(net, config, run_model=lambda: [net(x) for x in data], progress=False)
    elif name == "lora_ga":
        preprocess_loraga(net, config, lambda: [net(x).square().sum().backward() for x in data], progress=False)
    model = get_peft_model(net, config)
    if name == "eva":
        initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


def trained(dtype: torch.dtype) -> PeftModel:
    """Some steps with dropout from a start that is drawn, and combinations of what they give."""
    torch.manual_seed(7)
    model = adapted("True", dtype, lora_dropout=0.1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for x in batches(dtype):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    model.add_adapter("other", LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
    for kind in ("cat", "svd", "linear"):
        model.add_weighted_adapter(["default", "other"], [0.7, -0.2], kind, kind)
    return model


def numbers(model: nn.Module) -> Numbers:
    return {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}


def same(a: Numbers, b: Numbers) -> bool:
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", DRAWN + FROM_WEIGHT)
def test_an_init_is_the_same_every_time(name: str, dtype: torch.dtype) -> None:
    """Bit for bit; those from the weight and from data whatever the seed."""
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        made.append(numbers(adapted(name, dtype)))
    assert same(made[0], made[1])
    assert same(made[0], made[2]) == (name in FROM_WEIGHT)


def test_random_directions_of_lora_ga_are_drawn_from_the_seed() -> None:
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        options = LoraGAConfig(direction="random")
        made.append(numbers(adapted("lora_ga", torch.float32, lora_ga_config=options)))
    assert same(made[0], made[1]) and not same(made[0], made[2])


@pytest.mark.parametrize("method", [True, False, "gaussian", "orthogonal", "pissa"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_draw_from_a_given_generator_has_nothing_to_do_with_the_global_one(library: str, method: bool | str) -> None:
    weight: Any = np.random.default_rng(5).standard_normal((6, 8))
    weight = weight if library == "numpy" else torch.from_numpy(weight)
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        rng = np.random.default_rng(3) if library == "numpy" else torch.Generator().manual_seed(3)
        before = torch.get_rng_state()
        options = {"niter": 1} if method == "pissa" else {}
        made.append(METHODS[method].kinds["linear"](weight, 2, 1.0, rng, **options)[:2])
        assert torch.equal(before, torch.get_rng_state())
    assert all((x == y).all() for x, y in zip(*made, strict=True))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropouts_masks_follow_the_seed_whatever_the_number_of_threads(p: float) -> None:
    made = []
    for threads, seed in ((1, 0), (2, 0), (1, 1)):
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        made.append(fused.mask(torch.ones(1000, 300), p))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_training_merging_and_combining_are_the_same_every_time() -> None:
    """And in torch's deterministic mode, which refuses operations that are not."""
    made, outputs, x = [], [], batches(torch.float32)[0]
    for deterministic in (False, False, True):
        torch.use_deterministic_algorithms(deterministic)
        model = trained(torch.float32).eval()
        made.append(numbers(model))
        unmerged = model(x).detach()
        model.merge_adapter()
        outputs.append((unmerged, model(x).detach()))
    for again, output in zip(made[1:], outputs[1:], strict=True):
        assert same(made[0], again)
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], output, strict=True))


# -- threads -------------------------------------------------------------------------------------

CASES: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: adapted(name, torch.float64)) for name in DRAWN + FROM_WEIGHT},
    "training": lambda: trained(torch.float64),
}


def everything() -> dict[str, Numbers]:
    made = {}
    for name, make in CASES.items():
        torch.manual_seed(3)
        made[name] = numbers(make())
    return made


def on_threads(count: int, folder: Path) -> dict[str, Numbers]:
    """From another process, whose BLAS libraries have so many threads from the start."""
    path = folder / f"{count}.npz"
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(count))
    # threads that wait do not spin: other tests need the cores
    waiting = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
        "GOMP_SPINCOUNT": "0",
        "OPENBLAS_THREAD_TIMEOUT": "4",
    }
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | threads | waiting | {"PYTHONPATH": str(root)}
    subprocess.run([sys.executable, __file__, str(path)], env=environment, check=True, cwd=root)
    made: dict[str, Numbers] = {}
    with np.load(path) as flat:
        assert flat["threads"] == count
        for key in flat.files:
            case, bar, name = key.partition("|")
            if bar:
                made.setdefault(case, {})[name] = flat[key]
    return made


def test_another_number_of_threads_rounds_otherwise_at_most(tmp_path: Path) -> None:
    """Random draws are the same bit for bit. Products may be summed in another order, which changes their last digits.

    Singular vectors magnify that by the gaps between singular values, here below 1e4. `agree` allows 1e6.
    """
    one, two = on_threads(1, tmp_path), on_threads(2, tmp_path)
    for case in CASES:
        a, b = one[case], two[case]
        assert a.keys() == b.keys(), case
        drawn = {key for key in a if "lora_" in key} if case in ("True", "False", "gaussian") else set()
        assert all(a[key].tobytes() == b[key].tobytes() for key in drawn), case
        for key in a:
            agree(a[key], b[key], what=f"{case}, {key}")


if __name__ == "__main__":
    arrays = {f"{case}|{name}": x for case, tensors in everything().items() for name, x in tensors.items()}
    np.savez(sys.argv[1], threads=torch.get_num_threads(), **arrays)
