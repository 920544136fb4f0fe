"""Tiny models of many families, and what each can be: ``docs/families.md`` has the same rows."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, RwkvConfig

from tests.conftest import byte_tokenizer

WINDOW = 32
V = len(byte_tokenizer())
BASE: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256,
}  # fmt: skip
GATED = BASE | {"num_key_value_heads": 2, "intermediate_size": 48}
HEADS = GATED | {"head_dim": 8}
GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FINE_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
GEMMA = HEADS | SLIDING | {"query_pre_attn_scalar": 8}
PER_LAYER = HEADS | SLIDING | {"vocab_size_per_layer_input": V, "num_kv_shared_layers": 0}
OPT = BASE | {"ffn_dim": 48, "word_embed_proj_dim": 32}
STATE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1}
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LATENT_ATTENTION = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A kind of model in small.

    Attributes:
        kind: The library's ``model_type``.
        sender, receiver: Whether it can be that.
        engine: How it generates for many requests at once; empty where it is no receiver.
        wide: What of its shape, changed, lifts its windows.
    """

    kind: str
    shape: dict[str, Any]
    sender: bool = True
    receiver: bool = True
    engine: str = "continuous"
    wide: dict[str, Any] = field(default_factory=dict)


UNWINDOWED = {"sliding_window": 4 * WINDOW}
FAMILIES: dict[str, Family] = {
    "Llama": Family("llama", GATED),
    "Llama, YaRN": Family(
        "llama",
        GATED | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                                     "original_max_position_embeddings": 64}},
    ),
    "Llama, dynamic RoPE": Family(
        "llama",
        GATED | {"max_position_embeddings": 64,
                 "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "Llama 4 (text)": Family(
        "llama4_text",
        HEADS | {"num_local_experts": 2, "num_experts_per_tok": 1, "attention_chunk_size": WINDOW,
                 "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0]},
        engine="padded",
        wide={"attention_chunk_size": 4 * WINDOW},
    ),
    "Mistral": Family("mistral", GATED | {"sliding_window": WINDOW}, wide=UNWINDOWED),
    "Mixtral": Family("mixtral", GATED | EXPERTS),
    "Qwen2": Family("qwen2", GATED),
    "Qwen2, sliding window": Family(
        "qwen2", GATED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}, wide=UNWINDOWED
    ),
    "Qwen2-MoE": Family("qwen2_moe", GATED | FINE_EXPERTS | {"shared_expert_intermediate_size": 16}),
    "Qwen3": Family("qwen3", HEADS),
    "Qwen3-MoE": Family("qwen3_moe", HEADS | FINE_EXPERTS),
    "Qwen3-Next": Family("qwen3_next", HEADS | FINE_EXPERTS | LINEAR, engine="padded"),
    "Phi": Family("phi", GATED),
    "Phi-3": Family("phi3", GATED | {"pad_token_id": 2, "sliding_window": WINDOW}, wide=UNWINDOWED),
    "Phi-3, LongRoPE": Family(
        "phi3", GATED | {"pad_token_id": 2, "original_max_position_embeddings": 64, "rope_parameters": LONG_ROPE}
    ),
    "Phi-MoE": Family("phimoe", GATED | EXPERTS),
    "Gemma": Family("gemma", HEADS),
    "Gemma 2": Family("gemma2", GEMMA, engine="padded", wide=UNWINDOWED),
    "Gemma 3 (text)": Family("gemma3_text", GEMMA, wide=UNWINDOWED),
    "Gemma 3 (vision)": Family(
        "gemma3",
        {"text_config": GEMMA, "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 3,
         "boi_token_index": 4, "eoi_token_index": 5},
        receiver=False,
    ),
    "Gemma 3n": Family(
        "gemma3n_text",
        PER_LAYER | {"hidden_size_per_layer_input": 8, "laurel_rank": 8, "activation_sparsity_pattern": [0.0, 0.0]},
        sender=False,
        receiver=False,
    ),
    "Gemma 4": Family("gemma4_text", PER_LAYER | {"hidden_size_per_layer_input": 0}, engine="padded", wide=UNWINDOWED),
    "Gemma 4, per-layer inputs": Family("gemma4_text", PER_LAYER | {"hidden_size_per_layer_input": 8}, receiver=False),
    "GPT-2": Family("gpt2", GPT),
    "GPT-J": Family("gptj", GPT | {"rotary_dim": 8}, engine="padded"),
    "GPT-Neo": Family(
        "gpt_neo",
        {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256,
         "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        engine="padded",
        wide={"window_size": 4 * WINDOW},
    ),
    "GPT-NeoX (Pythia)": Family("gpt_neox", BASE | {"intermediate_size": 64}),
    "GPT-BigCode": Family("gpt_bigcode", GPT),
    "gpt-oss": Family("gpt_oss", HEADS | EXPERTS | SLIDING, engine="padded", wide=UNWINDOWED),
    "OPT": Family("opt", OPT),
    "OPT, narrow embedding": Family("opt", OPT | {"word_embed_proj_dim": 16}),
    "BLOOM": Family("bloom", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}, engine="padded"),
    "Falcon": Family("falcon", BASE | {"num_kv_heads": 2, "new_decoder_architecture": True}, engine="padded"),
    "Falcon, ALiBi": Family("falcon", BASE | {"alibi": True, "multi_query": True}, engine="padded"),
    "MPT": Family(
        "mpt", {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, engine="padded"
    ),
    "OLMo": Family("olmo", GATED),
    "OLMo 2": Family("olmo2", GATED),
    "OLMo 3": Family("olmo3", GATED | SLIDING, wide=UNWINDOWED),
    "OLMoE": Family("olmoe", GATED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite": Family(
        "granite", GATED | {"embedding_multiplier": 12.0, "residual_multiplier": 0.3, "logits_scaling": 4.0}
    ),
    "Granite-MoE": Family("granitemoe", GATED | EXPERTS),
    "Granite 4 (hybrid)": Family(
        "granitemoehybrid",
        GATED | EXPERTS | MAMBA | {"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
        engine="padded",
    ),
    "Cohere": Family("cohere", GATED),
    "Cohere 2": Family("cohere2", GATED | SLIDING, wide=UNWINDOWED),
    "GLM-4": Family("glm4", HEADS | {"partial_rotary_factor": 0.5, "pad_token_id": 2}),
    "StarCoder 2": Family("starcoder2", GATED | {"sliding_window": WINDOW}, wide=UNWINDOWED),
    "SmolLM3": Family("smollm3", GATED | {"pad_token_id": 2}),
    "StableLM": Family("stablelm", GATED, engine="padded"),
    "EXAONE 4": Family("exaone4", GATED | SLIDING, wide=UNWINDOWED),
    "Nemotron": Family("nemotron", GATED, engine="padded"),
    "Apertus": Family("apertus", GATED),
    "DeepSeek-V3": Family("deepseek_v3", GATED | LATENT_ATTENTION, engine="padded"),
    "Mamba": Family("mamba", STATE, engine="padded"),
    "Mamba 2": Family("mamba2", STATE | {"head_dim": 16, "num_heads": 4, "n_groups": 1}, engine="padded"),
    "Falcon-Mamba": Family("falcon_mamba", STATE, engine="padded"),
    "Jamba": Family(
        "jamba",
        GATED | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                 "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4,
                 "use_mamba_kernels": False},
        engine="padded",
    ),
    "LFM2": Family(
        "lfm2", GATED | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}, engine="padded"
    ),
    "RecurrentGemma": Family(
        "recurrent_gemma",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 1,
         "intermediate_size": 96, "lru_width": 32, "attention_window_size": WINDOW},
        engine="padded",
    ),
    "Bamba": Family("bamba", GATED | MAMBA | {"attn_layer_indices": [1]}, receiver=False),
    "Falcon-H1": Family("falcon_h1", GATED | MAMBA | {"mamba_d_ssm": 64}, receiver=False),
    "Zamba 2": Family(
        "zamba2",
        GATED | {"mamba_d_state": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "num_mem_blocks": 1,
                 "hybrid_layer_ids": [1], "layers_block_type": ["mamba", "hybrid"], "use_mem_rope": True},
        receiver=False,
    ),
    "RWKV": Family(
        "rwkv",
        {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32,
         "context_length": 256},
        receiver=False,
    ),
}  # fmt: skip
MADE: dict[str, Callable[..., PreTrainedConfig]] = {"rwkv": RwkvConfig}
"""Configurations that the library's own table leaves out."""


def write_family(folder: Path, family: Family, **changes: Any) -> Path:
    """A random model of a family and a byte tokenizer; the same weights whatever ``changes`` its attention reaches.

    Weights are drawn three times wider than usual, so that outputs depend on inputs as in a trained model.
    """
    make = MADE.get(family.kind)
    shape = family.shape | changes
    config = make(**shape) if make else AutoConfig.for_model(family.kind, **shape)  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
