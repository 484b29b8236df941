"""What things cost: lora_ref beside PEFT, loralib, full fine-tuning and the frozen layer, as ratios."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts the memory, need not say so
