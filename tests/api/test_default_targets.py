"""The targets of architectures, where a configuration names none."""

import pytest

from lora_ref import LoraConfig
from lora_ref.api.default_targets import ARCHITECTURES
from lora_ref.core.names import ModelNames, resolve


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_none_takes_the_targets_of_the_architecture(model_type: str) -> None:
    plan = resolve(ModelNames({"up": "linear"}, model_type=model_type), LoraConfig(), ARCHITECTURES)
    assert plan.target_modules == ARCHITECTURES[model_type]


def test_the_table_has_the_forty_architectures() -> None:
    assert len(ARCHITECTURES) == 40
    assert ARCHITECTURES["gpt2"] == ["c_attn"] and ARCHITECTURES["phi"] == ["q_proj", "v_proj", "fc1", "fc2"]
    assert ARCHITECTURES["mt5"] == ["q", "v"] and ARCHITECTURES["electra"] == ["query", "value"]
