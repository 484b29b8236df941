"""A LoRA to read: `plain`. It passes every requirement, and the seeded faults are faults in it."""
