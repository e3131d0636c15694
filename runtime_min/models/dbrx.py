"""DBRX: LayerNorms without bias, one matrix of queries, keys and values, clipped; the experts' matrices lie
one below the other in three tensors. Source: transformers 5.23.0, `modeling_dbrx.py`."""

from moeplan.runtime_min.models.architecture import Architecture

DBRX = Architecture(
    class_name="DbrxForCausalLM",
    mlp="ffn",
    matrices=("w1", "w2", "v1"),
    experts="rows",
    norm="layer",
    fused_qkv=True,
    gate="router.layer",
    renormalise_key="moe_normalize_expert_weights",
    experts_keys=("moe_num_experts",),
    width_key="ffn_hidden_size",
    keys=(
        ("hidden_size", "d_model"),
        ("num_attention_heads", "n_heads"),
        ("num_hidden_layers", "n_layers"),
        ("max_position_embeddings", "max_seq_len"),
        ("num_key_value_heads", "attn_config.kv_n_heads"),
        ("clip_qkv", "attn_config.clip_qkv"),
        ("rope_theta", "attn_config.rope_theta"),
        ("moe_num_experts", "ffn_config.moe_num_experts"),
        ("num_experts_per_tok", "ffn_config.moe_top_k"),
        ("ffn_hidden_size", "ffn_config.ffn_hidden_size"),
        ("hidden_act", "ffn_config.ffn_act_fn.name"),
        ("moe_normalize_expert_weights", "ffn_config.moe_normalize_expert_weights"),
    ),
    names=(
        ("model.embed_tokens.", "transformer.wte."),
        ("model.norm.", "transformer.norm_f."),
        ("model.layers.", "transformer.blocks."),
        (".input_layernorm.", ".norm_attn_norm.norm_1."),
        (".post_attention_layernorm.", ".norm_attn_norm.norm_2."),
        (".self_attn.qkv_proj.", ".norm_attn_norm.attn.Wqkv."),
        (".self_attn.o_proj.", ".norm_attn_norm.attn.out_proj."),
        (".ffn.experts.", ".ffn.experts.mlp."),
    ),
)
