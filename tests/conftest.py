"""What every test runs under: no network, one thread unless OMP_NUM_THREADS says more, Hypothesis profiles, and array
shapes checked at run time."""

import getpass
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
# one by default: two processes of tests wait for each other's threads
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("OPENBLAS_NUM_THREADS", os.environ["OMP_NUM_THREADS"])  # NumPy's
# compiled code fits one kernel: that of another does not compile, or computes something else
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(
    tempfile.gettempdir(),
    f"lora_ref-inductor-{getpass.getuser()}-{os.environ.get('ATEN_CPU_CAPABILITY', 'native')}",
)

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from jaxtyping import install_import_hook
from threadpoolctl import threadpool_limits

# `Float[Array, "out in"]` in these modules' signatures is checked, shapes and all, at every call. Not in
# `lora_ref.core.scaling` and `lora_ref.init.options`: these have errors of their own for a value of the wrong type.
INITS = ("corda", "eva", "loftq", "lora_ga", "mica", "olora", "orthogonal", "pissa", "residual")
CHECKED = ("core.update", "numerics", "api.combination", *(f"init.{name}" for name in INITS))
install_import_hook([f"lora_ref.{name}" for name in CHECKED], "beartype.beartype")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# a pytest plugin may have loaded NumPy before this file: then the variable above came too late
threadpool_limits(int(os.environ["OPENBLAS_NUM_THREADS"]), user_api="blas")

slow_is_fine = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
# the default run is the same every time; the deep one looks where nobody has looked
settings.register_profile("default", max_examples=25, derandomize=True, **slow_is_fine)
settings.register_profile("deep", max_examples=1000, **slow_is_fine)
settings.register_profile("quick", max_examples=3, stateful_step_count=20, derandomize=True, **slow_is_fine)
settings.register_profile("unshrunk", max_examples=25, phases=(Phase.explicit, Phase.generate), **slow_is_fine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture
def masks_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`lora_ref` draws dropout's masks as `nn.Dropout` does, so that PEFT has the same ones after the same seed."""
    from lora_ref.fast import linear as fused

    def mask(x: torch.Tensor, p: float) -> torch.Tensor:
        kept = torch.nn.functional.dropout(torch.ones(x.shape), p) != 0
        return kept.view(torch.uint8).view(-1, x.shape[-1])

    monkeypatch.setattr(fused, "mask", mask)
