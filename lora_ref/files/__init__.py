"""The adapter folder, in PEFT's format."""
