"""Small random models of every text decoder family that ``AutoModelForCausalLM`` of the installed transformers builds.

`config_of` makes a family's configuration, `tests.small.model_of` a model of it.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

LINEAR, FULL, SLIDING, INDEXED = "linear_attention", "full_attention", "sliding_attention", "indexed_attention"

# What a family does not know is set on its configuration as an attribute that nothing reads.
BASE: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large, so that attention is far from uniform
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

_GPT = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 512, "n_inner": 96}  # GPT-2's names
_WINDOW = {"sliding_window": 32}
_LOCAL = {**_WINDOW, "layer_types": [SLIDING, FULL, SLIDING, FULL]}
_LOCAL_3_1 = {**_WINDOW, "layer_types": [SLIDING, SLIDING, SLIDING, FULL]}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
# Multi-head latent attention: heads of 16 + 8 (rotated) for queries and keys, 16 for values; no GQA
_MLA = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
_ROUTED = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# All of 512 tokens are attended to, see VARIANTS for fewer
_INDEX = {"index_topk": 512, "index_head_dim": 16, "index_n_heads": 2}
_DELTA = {  # gated delta net
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": [LINEAR, FULL, LINEAR, FULL],
}
_MAMBA2 = {  # heads * d_head = expand * hidden_size
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}

FAMILIES: dict[str, dict[str, Any]] = {
    # Plain attention over everything
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "biogpt": {},
    "bloom": {"n_layer": 4, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 8},
    "cohere": {},
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_length": 4, "segment_types": 3},
    "ctrl": {**_GPT, "dff": 96},
    "diffllama": {},
    "doge": {},
    "ernie4_5": {},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True, "ffn_hidden_size": 96},
    "gemma": {},
    "glm": {},
    "glm4": {},
    "gpt-sw3": _GPT,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neox": {},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "gptj": {**_GPT, "rotary_dim": 8},
    "granite": {"attention_multiplier": 0.25},
    "helium": {},
    "hunyuan_v1_dense": {},
    "hyperclovax": {"attention_multiplier": 0.25},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "llama": {},
    "ministral3": {},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 512, "expansion_ratio": 2},
    "nanochat": {},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "openai-gpt": _GPT,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.2},
    "persimmon": {},
    "phi": {},
    "phi3": {"original_max_position_embeddings": 512},
    "qwen2": {},
    "qwen3": {},
    "seed_oss": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},  # the second layer has no positions
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "xglm": {"d_model": 64, "ffn_dim": 96, "num_layers": 4, "attention_heads": 4, "init_std": 0.2},
    # Sliding windows
    "cohere2": _LOCAL_3_1,
    "cohere_compass_text": {
        **_LOCAL,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in (SLIDING, FULL)},
    },
    "cwm": {**_LOCAL, "bos_token_id": 2},
    "exaone4": {**_LOCAL, "sliding_window_pattern": 2},
    "gemma2": {**_LOCAL, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_LOCAL, "query_pre_attn_scalar": 16},
    "gemma3n_text": {  # the last two layers attend with the keys of the first two
        **_LOCAL,
        "vocab_size_per_layer_input": 400,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [96] * 4,
    },
    "gemma4_text": {
        **_LOCAL,
        "vocab_size_per_layer_input": 400,
        "hidden_size_per_layer_input": 8,
        "per_layer_config": {layer: {"head_dim": 32} for layer in (1, 3)},  # global heads are wider; else 512
    },
    "gemma4_unified_text": {**_LOCAL, "per_layer_config": {layer: {"head_dim": 32} for layer in (1, 3)}},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 32},
    "granite_swa": {**_LOCAL, "attention_multiplier": 0.25, "layer_rope_theta": [1e4] * 4},
    "ministral": _LOCAL,
    "mistral": {"sliding_window": 400},  # in every layer
    "modernbert-decoder": {**_LOCAL, "local_attention": 32, "bos_token_id": 2},
    "olmo3": _LOCAL_3_1,
    "vaultgemma": {**_LOCAL, "query_pre_attn_scalar": 16},
    # Experts
    "afmoe": {**_EXPERTS, **_LOCAL, "num_dense_layers": 1, "num_shared_experts": 1, "global_attn_every_n_layers": 2},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "beam": {
        **_EXPERTS,
        **_LOCAL,
        **_SPARSE,
        "num_experts": 8,
        "n_group": 2,
        "topk_group": 1,
    },
    "cohere2_moe": {**_EXPERTS, **_LOCAL},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {**_ROUTED, "layer_types": [FULL] * 4},
    "ernie4_5_moe": {
        "moe_intermediate_size": 32,
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
    },
    "exaone_moe": {**_EXPERTS, **_LOCAL, **_SPARSE, "num_shared_experts": 1, "sliding_window_pattern": 2},
    "flex_olmo": _EXPERTS,
    "flint": {**_EXPERTS, **_LOCAL, "shared_expert_intermediate_size": 32, "mlp_only_layers": [0]},
    "glm4_moe": {**_ROUTED},
    "gpt_oss": {
        **_LOCAL,
        **_LOCAL_EXPERTS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},  # rather than YaRN for 4096 tokens
    },
    "granitemoe": {**_LOCAL_EXPERTS, "attention_multiplier": 0.25},
    "granitemoe_swa": {
        **_LOCAL,
        **_LOCAL_EXPERTS,
        "attention_multiplier": 0.25,
        "layer_rope_theta": [1e4] * 4,
        "shared_intermediate_size": 32,
    },
    "granitemoeshared": {**_LOCAL_EXPERTS, "attention_multiplier": 0.25, "shared_intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "moe_intermediate_size": 32},
    "hy_v3": {**_EXPERTS, **_SPARSE},
    "jetmoe": {**_LOCAL_EXPERTS, "kv_channels": 16, "num_key_value_heads": 2, "num_attention_heads": 4},
    "kolibri1": {**_EXPERTS, **_LOCAL, "num_local_experts": 4, "shared_expert_intermediate_size": 32},
    "laguna": {
        **_EXPERTS,
        **_LOCAL,
        **_SPARSE,
        "shared_expert_intermediate_size": 32,
        "num_attention_heads_per_layer": [4] * 4,
    },
    "llama4_text": {
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "attention_chunk_size": 32,
        "layer_types": ["chunked_attention", FULL, "chunked_attention", FULL],
        "no_rope_layers": [1, 0, 1, 0],
        "interleave_moe_layer_step": 2,
        "moe_layers": [1, 3],
    },
    "mellum": {**_LOCAL, **_LOCAL_EXPERTS, "moe_intermediate_size": 32, "mlp_layer_types": ["sparse"] * 4},
    "mimo_v2_flash": {**_LOCAL, **_ROUTED, **_SPARSE, "v_head_dim": 8},  # values narrower than keys
    "minimax_m2": {**_LOCAL_EXPERTS, "rotary_dim": 8},
    "minimax_m3_vl_text": {
        **_LOCAL_EXPERTS,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 32,
        "rotary_dim": 8,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": [FULL] * 4,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 64,
    },
    "mixtral": _LOCAL_EXPERTS,
    "olmoe": _EXPERTS,
    "phimoe": _LOCAL_EXPERTS,
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**_EXPERTS, "num_local_experts": 4},
    "solar_open": _ROUTED,
    "zaya": {**_EXPERTS, "router_hidden_size": 16, "num_experts_per_tok": 1, "layer_types": ["hybrid"] * 4},
    # Latent attention
    "axk1": {**_MLA, **_ROUTED, **_SPARSE},
    "axk2": {**_MLA, **_ROUTED, **_SPARSE, **_INDEX, "layer_types": [INDEXED] * 4, "gated_norm_rank": 8},
    "deepseek_v2": {**_MLA, **_ROUTED},
    "deepseek_v3": {**_MLA, **_ROUTED},
    "deepseek_v32": {**_MLA, **_ROUTED, **_SPARSE, **_INDEX, "layer_types": [INDEXED] * 4},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": [SLIDING, "compressed_sparse_attention", "heavily_compressed_attention", SLIDING],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "hc_mult": 2,
        **_INDEX,
    },
    "dots3_note_text": {
        **_MLA,
        **_ROUTED,
        **_SPARSE,
        **_INDEX,
        "layer_types": [INDEXED, SLIDING, INDEXED, SLIDING],
        "sliding_window": 32,
        "shared_experts_intermediate_size": 32,
        "per_layer_config": {layer: {"head_dim": 24} for layer in (1, 3)},  # of the sliding ones: 16 + 8
    },
    "glm4_moe_lite": {**_MLA, **_ROUTED, **_SPARSE},
    "glm_moe_dsa": {
        **_MLA,
        **_ROUTED,
        **_SPARSE,
        **_INDEX,
        "layer_types": [INDEXED] * 4,
        "indexer_types": ["full"] * 4,
    },
    "hy_v4": {
        **_MLA,
        **_ROUTED,
        **_SPARSE,
        **_INDEX,
        "layer_types": [INDEXED] * 4,
        "indexer_types": ["full"] * 4,
        "hc_mult": 2,
    },
    "longcat_flash": {  # two attentions a layer
        **_MLA,
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 32,
        "moe_topk": 2,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
    },
    "minicpm3": {**_MLA, "dim_model_base": 64},
    "youtu": {**_MLA, "embedding_initializer_range": 0.2},
    # Hybrids with linear attention, convolutions or state spaces, and those alone
    "bailing_hybrid": {
        **_MLA,
        "model_max_length": 512,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "num_expert_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "linear_conv_kernel_dim": 4,
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        **_SPARSE,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128},  # attention and Mamba side by side in every layer
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4, "intermediate_size": 128},
    "granitemoehybrid": {
        **_MAMBA2,
        **_LOCAL_EXPERTS,
        "attention_multiplier": 0.25,
        "shared_intermediate_size": 32,
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        "position_embedding_type": "rope",  # by default none
    },
    "hrm_text": {"num_hidden_layers": 1, "prefix_lm": False},  # a stack's; the configuration makes 8 of it, in cycles
    "inkling2_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 32,
        "d_rel": 8,
        "rel_extent": 64,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_layers_per_attn_res_block": 2,
        "unpadded_vocab_size": 400,
    },
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 32,
        "d_rel": 8,
        "rel_extent": 64,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding", "hybrid"],
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "logits_mup_width_multiplier": 1.0,
        "unpadded_vocab_size": 400,
        **_SPARSE,
    },
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        **_MLA,
        "model_max_length": 512,
        "q_lora_rank": None,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        **_SPARSE,
    },
    "lfm2": {"layer_types": ["conv", FULL, "conv", FULL], "full_attn_idxs": [1, 3], "block_multiple_of": 32},
    "lfm2_moe": {**_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", FULL, "conv", FULL]},
    "lfm3": {**_WINDOW, "layer_types": ["conv", FULL, SLIDING, FULL], "conv_L_cache": 3},
    "mamba": {"state_size": 8, "time_step_rank": 4, "intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "chunk_size": 16, "time_step_rank": 4},
    "minimax": {**_LOCAL_EXPERTS, "layer_types": [LINEAR, FULL, LINEAR, FULL], "block_size": 16},
    "nemotron_h": {
        "layers_block_type": [LINEAR, "moe", FULL, "mlp", LINEAR, FULL],
        "num_hidden_layers": 6,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "use_mamba_kernels": False,
    },
    "olmo_hybrid": {**_DELTA, "linear_num_key_heads": 4},
    "qwen3_5_moe_text": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": _DELTA,
    "qwen3_next": {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen4_exp_text": {
        **_DELTA,
        **_EXPERTS,
        "shared_expert_intermediate_size": 32,
        "layer_types": [LINEAR, INDEXED, LINEAR, INDEXED],
        "hc_count": 2,
        "hc_lowrank": 8,
        "ple_embed_dim": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 400,
        "split_ngram_parts": 1,
        "heads_per_ngram": 2,
    },
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 32, "block_types": ["recurrent", "attention"]},
    "rwkv": {"context_length": 512, "attention_hidden_size": 64},
    "xlstm": {"embedding_dim": 64, "num_blocks": 4, "num_heads": 4, "chunk_size": 16, "qk_dim_factor": 1.0},
    "zamba": {
        "num_key_value_heads": 4,
        "attention_hidden_size": 128,  # the attention reads the layer's input beside the embeddings
        "attention_head_dim": 32,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
    },
    "zamba2": {
        "num_key_value_heads": 4,
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
        "mamba_d_state": 16,
        "mamba_ngroups": 1,
        "n_mamba_heads": 8,
        "mamba_headdim": 16,
        "chunk_size": 16,
        "adapter_rank": 8,
        "use_mem_rope": True,
        "time_step_min": 1e-9,  # transformers has this floor in a long pass, and not in steps
        "use_mamba_kernels": False,
    },
}

# Other settings of the same families that change how they attend
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "phi3, window": ("phi3", _WINDOW),  # in every layer, no layer_types
    "starcoder2, window": ("starcoder2", _WINDOW),  # in every layer, no layer_types
    "mixtral, window": ("mixtral", _WINDOW),
    "qwen2, window": ("qwen2", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3, window": ("qwen3", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3_moe, window": ("qwen3_moe", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "falcon, multi-query": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "cohere, qk norm": ("cohere", {"use_qk_norm": True}),
    "stablelm, qk norm": ("stablelm", {"qk_layernorm": True}),
    "granitemoehybrid, no positions": ("granitemoehybrid", {"position_embedding_type": None}),
    "zamba2, no rotation": ("zamba2", {"use_mem_rope": False}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text, keys as values": ("gemma4_text", {"attention_k_eq_v": True}),
    "gemma4_text, shared keys": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "exaone4, no window": ("exaone4", {"sliding_window": None, "layer_types": [FULL] * 4}),
    "minimax_m3_vl_text, sparse": (
        "minimax_m3_vl_text",
        {"layer_types": [FULL, "minimax_m3_sparse", FULL, "minimax_m3_sparse"], "index_topk_blocks": 2},
    ),
    **{
        # of 40 tokens, 16 are attended to; with fewer heads, ties between scores of 0 make the choice arbitrary
        f"{kind}, sparse": (kind, {"index_topk": 16, "index_n_heads": 16})
        for kind in ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4")
    },
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 64,  # factors change beyond it
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
}

# Fields of the base that a family refuses, or does not know
WITHOUT: dict[str, tuple[str, ...]] = {
    "falcon": ("head_dim",),
    "gpt_neox": ("num_key_value_heads",),
    "persimmon": ("num_key_value_heads",),
}

_ENCODER = "an encoder, or the decoder of an encoder-decoder model; no causal language model is published as such"
_MULTIMODAL = "has vision or audio parts"
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(
        (
            "bart bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text "
            "electra ernie marian mbart megatron-bert mvp pegasus plbart prophetnet rembert roberta "
            "roberta-prelayernorm roc_bert roformer trocr whisper xlm xlm-roberta xlm-roberta-xl xmod"
        ).split(),
        _ENCODER,
    ),
    **dict.fromkeys(
        (
            "emu3 fuyu gemma3 gemma3n gemma4 gemma4_unified git got_ocr2 mllama moss_transcribe_diarize "
            "phi4_multimodal dots3_note"
        ).split(),
        _MULTIMODAL,
    ),
    **dict.fromkeys("moshi musicgen musicgen_melody".split(), "decodes audio codes"),
    **dict.fromkeys("gemma4_assistant gemma4_unified_assistant".split(), "drafts from another model's cache"),
    "blt": "reads bytes in patches",
    "llama4": "its text part is llama4_text",
    "qwen3_5": "its text part is qwen3_5_text",
    "qwen3_5_moe": "its text part is qwen3_5_moe_text",
    "qwen4_exp": "its text part is qwen4_exp_text",
    "xlnet": "its attention is bidirectional, with memories of its own kind instead of a cache",
    "reformer": "LSH attention, needs lengths that are multiples of its chunks",
}


def config_of(kind: str, **changes: Any) -> Any:
    """The configuration of a small model of a family."""
    base = {name: value for name, value in BASE.items() if name not in WITHOUT.get(kind, ())}
    return AutoConfig.for_model(kind, **{**base, **FAMILIES[kind], **changes})


def variant_of(name: str) -> Any:
    """The configuration of a family or a variant."""
    kind, changes = VARIANTS.get(name, (name, {}))
    return config_of(kind, **changes)
