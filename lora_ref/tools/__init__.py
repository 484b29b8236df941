"""The command `lora-ref`: demo, inspect, plan, check."""
