"""`lora_ref.core` alone: a LoraModel without the files, the transactions and the fused kernels of the other rooms."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lora_ref.core.model import LoraModel

from .lora_ref_torch import LoraRefModel, LoraRefTorch

#: {claim: the room that has it}.
ELSEWHERE = {
    "files": "lora_ref.files",
    "strict_files": "lora_ref.files",
    "converts": "lora_ref.files",
    "own_files": "lora_ref.files",
    "reads_peft": "lora_ref.files",
    "init:eva": "lora_ref.calibration",
    "eva_ranks": "lora_ref.calibration",
    "all_or_nothing": "lora_ref.safe",
    "base_options": "lora_ref.safe",
    "update": "lora_ref.api",
    "weighted": "lora_ref.api",
    "rescale": "lora_ref.api",
    "scale_context": "lora_ref.api",
}


class CoreModel(LoraRefModel):
    """A LoraModel without a PeftModel around it."""

    def adapted_net(self, folder: Path | None) -> LoraModel:
        if folder is not None:
            raise NotImplementedError("lora_ref.core reads no files")
        model = LoraModel(self.net)
        model.add_adapter("default", self.config(self.spec.config))
        model.set_adapter("default")
        return model

    @property
    def lora_model(self) -> LoraModel:
        return self.peft

    def output(self, x: Tensor, adapter_names: list[str]) -> Tensor:
        with self.peft.mixed_batch(adapter_names):
            return self.peft(x)


class LoraRefCore(LoraRefTorch):
    """Claims what stands in lora_ref.core, with the inits of lora_ref.init. CorDA and LoRA-GA are prepared with data by
    lora_ref.calibration, before."""

    name = "lora_ref_core"
    model_class = CoreModel
    claims = LoraRefTorch.claims - ELSEWHERE.keys()
