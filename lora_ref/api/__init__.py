"""What users of PEFT type: the model put together, `get_peft_model`, combinations, default targets."""
