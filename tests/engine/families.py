"""Families of models, each as the configuration of a tiny one: what is served, and what is refused with which sentence.

The README's table is made from this list.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import models
from tests.models import CONTEXT, VOCABULARY

COMMON = {**models.COMMON, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT, "n_inner": 96}
MLA = {
    "num_key_value_heads": 4, "head_dim": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12,
}  # fmt: skip
DEEPSEEK = {**MLA, **MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
GEMMA3N: dict[str, Any] = {
    "sliding_window": 24, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 8,
    "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4, "pad_token_id": 0,
}  # fmt: skip
GEMMA4: dict[str, Any] = {
    "sliding_window": 24, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 32,
    "num_kv_shared_layers": 0, "enable_moe_block": False, "pad_token_id": 0,
}  # fmt: skip
WINDOW: dict[str, Any] = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 48,
    "short_factor": [1.0] * 8, "long_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A configuration, and what becomes of it.

    Attributes:
        model_type: transformers' name.
        changes: fields of the configuration, None for one that the family does not have.
        variant: tells those of one family apart.
        refused: what the refusal says; None for what is served.
        attention: one of mii_hpc.engine.model.check.WAYS.
        sharding: one of mii_hpc.engine.model.sharding.SHARDINGS, or "" for one rank alone.
    """

    model_type: str
    changes: dict[str, Any] = field(default_factory=dict)
    variant: str = ""
    refused: str | None = None
    attention: str = "paged"
    sharding: str = "DeepSpeed"

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.variant}" if self.variant else self.model_type


STATE = "it keeps a state besides keys and values"

# fmt: off
FAMILIES = [
    Family("llama"),
    Family("llama", {"num_key_value_heads": 1}, "one-kv-head"),
    Family("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "dynamic"),
    Family("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor":
           1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}, "llama3"),
    Family("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
           "original_max_position_embeddings": 64}}, "yarn"),
    Family("llama4_text", {**MOE, "intermediate_size_mlp": 96, "attention_chunk_size": 32, "num_hidden_layers": 4,
           "floor_scale": 8, "use_qk_norm": True}, attention="one by one", sharding=""),
    Family("mistral", {"sliding_window": 24}),
    Family("ministral", WINDOW),
    Family("ministral3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
           "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1}}),
    Family("mixtral", MOE, sharding="plan"),
    Family("qwen2"),
    Family("qwen2", {**WINDOW, "use_sliding_window": True}, "window"),
    Family("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 32}, sharding="plan"),
    Family("qwen2_moe", {**MOE, **WINDOW, "shared_expert_intermediate_size": 32, "use_sliding_window": True},
           "window", sharding="plan"),
    Family("qwen3"),
    Family("qwen3_moe", MOE, sharding="plan"),
    Family("gemma"),
    Family("gemma2", {**WINDOW, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
    Family("gemma3_text", {**WINDOW, "query_pre_attn_scalar": 16}),
    Family("gemma3n_text", {**GEMMA3N, "num_kv_shared_layers": 0}, sharding="plan"),
    Family("gemma3n_text", {**GEMMA3N, "num_kv_shared_layers": 2}, "shared", sharding="plan"),
    Family("gemma4_text", GEMMA4, sharding="plan"),
    Family("gemma4_text", {**GEMMA4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}, "shared",
           sharding="plan"),
    Family("gemma4_text", {**GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
           "moe_intermediate_size": 32}, "moe", sharding="plan"),
    Family("vaultgemma", WINDOW),
    Family("phi", {"partial_rotary_factor": 0.5}),
    Family("phi3", sharding="plan"),
    Family("phi3", {"original_max_position_embeddings": 48, "rope_parameters": LONGROPE}, "longrope", sharding="plan"),
    Family("phi3", {"sliding_window": 24}, "window", sharding="plan"),
    Family("phimoe", {**MOE, "sliding_window": 24}, sharding="plan"),
    Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.3}),
    Family("gpt2", GPT2, sharding=""),
    Family("gpt_bigcode", GPT2),
    Family("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size":
           24, "num_attention_heads": None, "num_hidden_layers": None}, attention="cached"),
    Family("gpt_neox"),
    Family("gpt_neox_japanese", {"intermediate_multiple_size": 2}, attention="cached"),
    Family("gptj", {**GPT2, "rotary_dim": 8}, attention="cached"),
    Family("codegen", {**GPT2, "rotary_dim": 8}, attention="cached", sharding=""),
    Family("gpt_oss", {**MOE, **WINDOW}, sharding="plan"),
    Family("openai-gpt", GPT2, refused="it keeps no keys and values"),
    Family("bloom", {"n_head": 4, "n_layer": 2}, attention="cached", sharding=""),
    Family("falcon", {"alibi": False, "multi_query": True, "head_dim": None}, attention="cached", sharding=""),
    Family("falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None}, "new",
           attention="cached"),
    Family("falcon", {"alibi": True, "multi_query": False, "head_dim": None}, "alibi", attention="cached", sharding=""),
    Family("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": CONTEXT},
           attention="cached"),
    Family("xglm", {"d_model": 64, "attention_heads": 4, "num_layers": 2, "ffn_dim": 96, "init_std": 0.3},
           attention="cached"),
    Family("biogpt"),
    Family("bart", {"d_model": 64, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
           "encoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96, "is_decoder": True,
           "init_std": 0.3, "is_encoder_decoder": False, "pad_token_id": 1}, attention="one by one", sharding=""),
    Family("ctrl", {"n_embd": 64, "dff": 96, "n_head": 4, "n_layer": 2, "n_positions": CONTEXT}, sharding=""),
    Family("stablelm", {"partial_rotary_factor": 0.5}),
    Family("starcoder2", {"sliding_window": 24}),
    Family("persimmon", sharding=""),
    Family("cohere", {"logit_scale": 1.0}),
    Family("cohere2", {**WINDOW, "logit_scale": 1.0}),
    Family("olmo"),
    Family("olmo2", sharding="plan"),
    Family("olmo3", WINDOW, sharding="plan"),
    Family("olmoe", MOE, sharding="plan"),
    Family("flex_olmo", MOE, sharding="plan"),
    Family("granite"),
    Family("granitemoe", MOE, sharding="plan"),
    Family("granitemoeshared", {**MOE, "shared_intermediate_size": 32}, sharding="plan"),
    Family("nemotron"),
    Family("helium"),
    Family("glm"),
    Family("glm4"),
    Family("glm4_moe", {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
           sharding="plan"),
    Family("ernie4_5"),
    Family("ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1,
           "moe_num_shared_experts": 1}, sharding="plan"),
    Family("exaone4", {**WINDOW, "sliding_window_pattern": 2}),
    Family("hunyuan_v1_dense", sharding="plan"),
    Family("hunyuan_v1_moe", {**MOE, "moe_topk": 2}, sharding="plan"),
    Family("smollm3", {"no_rope_layers": [1, 0]}),
    Family("seed_oss"),
    Family("apertus"),
    Family("arcee"),
    Family("bitnet", sharding=""),
    Family("nanochat", sharding="plan"),
    Family("jais2"),
    Family("diffllama", attention="cached", sharding="plan"),
    Family("doge", attention="cached", sharding=""),
    Family("dots1", {**MOE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
           "n_shared_experts": 1}, sharding="plan"),
    Family("deepseek_v2", DEEPSEEK, sharding="plan"),
    Family("deepseek_v3", DEEPSEEK, sharding="plan"),
    Family("minicpm3", MLA),
    Family("longcat_flash", {**DEEPSEEK, "num_layers": 2, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 32,
           "moe_topk": 2, "zero_expert_num": 1, "num_hidden_layers": None}, sharding=""),
    Family("deepseek_v32", {**DEEPSEEK, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16},
           refused="its indexer keeps keys of its own"),
    Family("glm_moe_dsa", {**DEEPSEEK, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16},
           refused="its indexer keeps keys of its own"),
    Family("axk2", DEEPSEEK, refused="its indexer keeps keys of its own"),
    Family("hy_v4", refused="its indexer keeps keys of its own"),
    Family("dots3_note_text", {"num_key_value_heads": 4}, refused="its indexer keeps keys of its own"),
    Family("deepseek_v4", refused="it keeps compressed keys besides the KV cache"),
    Family("minimax_m2", MOE, sharding="plan"),
    Family("mamba", {"state_size": 8}, refused=STATE),
    Family("falcon_mamba", {"state_size": 8}, refused=STATE),
    Family("rwkv", refused=STATE),
    Family("jamba", {**MOE, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False,
           "pad_token_id": 0}, refused=STATE),
    Family("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16},
           refused=STATE),
    Family("nemotron_h", refused=STATE),
    Family("recurrent_gemma", {"lru_width": 64, "attention_window_size": 24, "num_hidden_layers": 3}, refused=STATE),
    Family("qwen3_next", {**MOE, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
           "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}, refused=STATE),
    Family("lfm2", {"layer_types": ["conv", "full_attention"]}, refused=STATE),
    Family("minimax", {**MOE, "layer_types": ["linear_attention", "full_attention"]}, refused=STATE),
    Family("inkling_text", refused=STATE),
    Family("zaya", {**MOE, "num_experts_per_tok": 1}, refused=STATE),
    Family("bert", {"is_decoder": True}),
    Family("bert", {"is_decoder": False}, "encoder", refused="its tokens attend to later ones"),
    Family("bart", {"is_encoder_decoder": True}, "encoder-decoder", refused="it is an encoder with a decoder"),
]
# fmt: on


def config_of(family: Family) -> Any:
    from transformers import AutoConfig

    fields = {**COMMON, **family.changes}
    # A None among the changes takes a field away; the padding's is one that families want.
    given = {name: value for name, value in fields.items() if value is not None or name == "pad_token_id"}
    return AutoConfig.for_model(family.model_type, **given)


def save_family(family: Family, folder: Path) -> Path:
    """Save a random model of a family with a tokenizer; return the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.models import save_tokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def table() -> str:
    """Return what the README says of the families, as a table."""
    sharded = {"DeepSpeed": "DeepSpeed", "plan": "transformers' plan", "": "one rank only"}
    attending = {
        "paged": "a back end",
        "cached": "transformers' cache, sequences together",
        "one by one": "transformers' cache, one after the other",
    }
    groups: dict[tuple[str, str], dict[str, None]] = {}
    for family in FAMILIES:
        how = (sharded[family.sharding], attending[family.attention])
        groups.setdefault(("refused", family.refused) if family.refused else how, {})[family.name] = None
    lines = ["| sharded by | attends through | families |", "|---|---|---|"]
    lines += [f"| {how} | {attends} | {' '.join(names)} |" for (how, attends), names in sorted(groups.items())]
    return "\n".join(lines) + "\n"
