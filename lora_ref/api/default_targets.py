"""target_modules=None: PEFT's default targets for each `config.model_type` of transformers."""

ARCHITECTURES: dict[str, list[str] | str] = {
    model_type: targets.split()
    for targets, model_types in {
        "q_proj v_proj": "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm "
        "gemma gemma2 gemma3_text qwen2 qwen3",
        "query value": "bert roberta xlm-roberta electra layoutlm",
        "query_key_value": "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
        "c_attn": "gpt2 gpt_bigcode",
        "q v": "t5 mt5",
        "q v q_proj v_proj": "blip-2",
        "query_proj value_proj": "deberta-v2",
        "in_proj": "deberta",
        "Wqkv": "mpt",
        "c_proj c_attn": "btlm",
        "qkv_proj": "codegen",
        "q_proj v_proj fc1 fc2": "phi",
        "q_proj k_proj v_proj o_proj": "nemotron_h",
        "key value receptance output": "rwkv",
        "r_proj k_proj v_proj o_proj key value": "rwkv7",
    }.items()
    for model_type in model_types.split()
} | {"gemma4": r".*language_model\..*\.(q_proj|v_proj)"}
