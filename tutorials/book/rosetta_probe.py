"""What a LoRA layer looks like in one library: `python rosetta_probe.py NAME` prints it as JSON.

Runs where that library is installed, and needs nothing of this project but for lora_ref itself. The layer has 5 inputs,
3 outputs, r = 2 and lora_alpha = 4; for the spread of A's start it is a large one.
"""

import importlib.metadata
import inspect
import json
import sys
import tempfile

IN, OUT, R, ALPHA = 5, 3, 2, 4
LARGE = 2048  # inputs and outputs of the layer whose A is measured


def lora_ref():
    import lora_ref

    return _peft_like(lora_ref, "lora_ref")


def peft():
    import peft

    return _peft_like(peft, "peft")


def _peft_like(library, distribution):
    import torch
    from safetensors.torch import load_file

    def made(n_in, n_out, r=R):
        net = torch.nn.Sequential()
        net.add_module("proj", torch.nn.Linear(n_in, n_out))
        config = library.LoraConfig(r=r, lora_alpha=ALPHA, target_modules=["proj"])
        return library.get_peft_model(net, config), net

    (model, net), (_, large) = made(IN, OUT), made(LARGE, LARGE, 64)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        keys = sorted(load_file(f"{folder}/adapter_model.safetensors"))
    A, B = net.proj.lora_A["default"].weight, net.proj.lora_B["default"].weight
    return {
        "version": importlib.metadata.version(distribution),
        "layer": "lora.Linear",
        "A": [".lora_A[name].weight", list(A.shape)],
        "B": [".lora_B[name].weight", list(B.shape)],
        "W": [".base_layer.weight", list(net.proj.base_layer.weight.shape)],
        "scale": [".scaling[name]", net.proj.scaling["default"]],
        "defaults": _defaults(library.LoraConfig, "r", "lora_alpha", "lora_dropout"),
        **_torch(A, B, large.proj.lora_A["default"].weight, net.proj, lambda: net.proj.base_layer.weight),
        "merge": _there(model, "merge_adapter", "unmerge_adapter", "merge_and_unload"),
        "keys": keys,
    }


def loralib():
    import loralib
    import torch

    net = torch.nn.Sequential()
    net.add_module("proj", loralib.Linear(IN, OUT, r=R, lora_alpha=ALPHA))
    loralib.mark_only_lora_as_trainable(net)
    large = loralib.Linear(LARGE, LARGE, r=64)
    return {
        "version": importlib.metadata.version("loralib"),
        "layer": "loralib.Linear",
        "A": [".lora_A", list(net.proj.lora_A.shape)],
        "B": [".lora_B", list(net.proj.lora_B.shape)],
        "W": [".weight", list(net.proj.weight.shape)],
        "scale": [".scaling", net.proj.scaling],
        "defaults": _defaults(loralib.Linear.__init__, "r", "lora_alpha", "lora_dropout"),
        **_torch(net.proj.lora_A, net.proj.lora_B, large.lora_A, net.proj, lambda: net.proj.weight),
        "merge": ["eval()", "train()"],
        "keys": sorted(loralib.lora_state_dict(net)),
    }


def torchtune():
    import torch
    import torchtune.modules.peft as tune

    def made(n_in, n_out, r=R):
        return tune.LoRALinear(n_in, n_out, rank=r, alpha=ALPHA)

    net = torch.nn.Sequential()
    net.add_module("proj", made(IN, OUT))
    A, B = net.proj.lora_a.weight, net.proj.lora_b.weight
    return {
        "version": importlib.metadata.version("torchtune"),
        "layer": "LoRALinear",
        "A": [".lora_a.weight", list(A.shape)],
        "B": [".lora_b.weight", list(B.shape)],
        "W": [".weight", list(net.proj.weight.shape)],
        "scale": [".alpha / .rank", net.proj.alpha / net.proj.rank],
        "defaults": _defaults(tune.LoRALinear.__init__, "rank", "alpha", "dropout"),
        **_torch(A, B, made(LARGE, LARGE, 64).lora_a.weight, net.proj, lambda: net.proj.weight),
        "merge": _there(tune, "get_merged_lora_ckpt"),
        "keys": sorted(tune.get_adapter_state_dict(net.state_dict())),
    }


def litgpt():
    import litgpt.lora as lit
    import torch

    net = torch.nn.Sequential()
    net.add_module("proj", lit.LoRALinear(IN, OUT, r=R, lora_alpha=ALPHA))
    proj = net.proj
    large = lit.LoRALinear(LARGE, LARGE, r=64)
    return {
        "version": importlib.metadata.version("litgpt"),
        "layer": "LoRALinear",
        "A": [".lora_A", list(proj.lora_A.shape)],
        "B": [".lora_B", list(proj.lora_B.shape)],
        "W": [".linear.weight", list(proj.linear.weight.shape)],
        "scale": [".scaling", proj.scaling],
        "defaults": _defaults(lit.LoRALinear.__init__, "r", "lora_alpha", "lora_dropout"),
        **_torch(proj.lora_A, proj.lora_B, large.lora_A, proj, lambda: proj.linear.weight),
        "merge": _there(lit, "merge_lora_weights") + [f"LoRALinear.{name}" for name in _there(proj, "merge")],
        "keys": sorted(key for key in net.state_dict() if lit.lora_filter(key, None)),
    }


def mlx():
    import mlx.core as mx
    import numpy as np
    from mlx import nn
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.lora import LoRALinear

    mx.set_default_device(mx.cpu)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = LoRALinear.from_base(nn.Linear(IN, OUT), r=R, scale=ALPHA / R)

    net = Net()
    proj = net.proj
    proj.linear.freeze()
    before, kept = np.array(proj(mx.ones((1, IN)))), np.array(proj.linear.weight)
    proj.lora_b = mx.ones(proj.lora_b.shape)
    net.eval()
    merged = not np.array_equal(np.array(proj.linear.weight), kept)
    large = np.array(LoRALinear.from_base(nn.Linear(LARGE, LARGE), r=64).lora_a)
    fresh = LoRALinear.from_base(nn.Linear(IN, OUT), r=R)
    assert before.shape == (1, OUT)
    return {
        "version": importlib.metadata.version("mlx-lm"),
        "layer": "LoRALinear",
        "A": [".lora_a", list(proj.lora_a.shape)],
        "B": [".lora_b", list(proj.lora_b.shape)],
        "W": [".linear.weight", list(proj.linear.weight.shape)],
        "scale": [".scale", float(proj.scale)],
        "defaults": _defaults(LoRALinear.from_base, "r", "scale", "dropout"),
        "zero": _zero(np.array(fresh.lora_a), np.array(fresh.lora_b)),
        "spread": round(float(large.std()) * LARGE**0.5, 1),
        "eval merges": merged,
        "merge": _there(proj, "fuse"),
        "keys": sorted(key for key, _ in tree_flatten(net.trainable_parameters())),
    }


def keras():
    import os

    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras
    import numpy as np

    def made(n_in, n_out, r=R, **options):
        layer = keras.layers.Dense(n_out, name="proj")
        layer.build((None, n_in))
        layer.enable_lora(r, **options)
        return layer

    layer, large, value = made(IN, OUT, lora_alpha=ALPHA), made(LARGE, LARGE, 64), keras.ops.convert_to_numpy
    signature = inspect.signature(keras.layers.Dense.enable_lora).parameters
    kept = value(layer._kernel.value)
    layer.lora_kernel_b.assign(np.ones((R, OUT)))
    layer(np.ones((1, IN)), training=False)
    fresh = made(IN, OUT)
    return {
        "version": keras.__version__,
        "layer": "Dense.enable_lora",
        "A": [".lora_kernel_a", list(layer.lora_kernel_a.shape)],
        "B": [".lora_kernel_b", list(layer.lora_kernel_b.shape)],
        "W": ["._kernel", list(layer._kernel.shape)],
        "scale": [".lora_alpha / .lora_rank", layer.lora_alpha / layer.lora_rank],
        "defaults": {name: _plain(signature[name].default) for name in ("rank", "lora_alpha")},
        "zero": _zero(value(fresh.lora_kernel_a.value), value(fresh.lora_kernel_b.value)),
        "spread": round(float(value(large.lora_kernel_a.value).std()) * LARGE**0.5, 1),
        "eval merges": not np.array_equal(value(layer._kernel.value), kept),
        "merge": ["quantize()", "save_own_variables()"] if hasattr(layer, "_get_kernel_with_merged_lora") else [],
        "keys": sorted(variable.path for variable in layer.trainable_variables if "lora" in variable.path),
    }


def _torch(A, B, large, module, weight):
    """What is measured on torch layers: which factor is zero, A's spread, and whether eval() changes the weight."""
    import torch

    zero, before = _zero(A.detach().numpy(), B.detach().numpy()), weight().detach().clone()
    with torch.no_grad():
        B.fill_(1.0)
    module.eval()
    merged = not torch.equal(weight().detach(), before)
    module.train()
    return {"zero": zero, "spread": round(float(large.detach().std()) * LARGE**0.5, 1), "eval merges": merged}


def _zero(A, B):
    return "".join(name for name, factor in (("A", A), ("B", B)) if not factor.any())


def _there(owner, *names):
    return [name for name in names if hasattr(owner, name)]


def _plain(value):
    return "must be given" if value is inspect.Parameter.empty else value


def _defaults(function, *names):
    parameters = inspect.signature(function).parameters
    return {name: _plain(parameters[name].default) for name in names}


PROBES = {f.__name__: f for f in (lora_ref, peft, loralib, torchtune, litgpt, mlx, keras)}

if __name__ == "__main__":
    sys.path = [place for place in sys.path if not place.endswith("book")]  # a script's folder is no place for imports
    print(json.dumps(PROBES[sys.argv[1]]()))
