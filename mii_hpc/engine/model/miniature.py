"""A small configuration of the same architecture, to see in a second whether it is served right."""

from __future__ import annotations

import copy
from typing import Any

WORDS = 64
WINDOW, CHUNK, ROPE_BOUND = 24, 32, 48
CONTEXT = 256
INNER = 64
"""Of the inner layers, on each rank: DeepSpeed shares out no less than so many columns."""


def miniature(config: Any, ranks: int) -> Any:
    """Return a configuration of few layers, heads, experts and words, with every kind of layer that the model has.

    Windows, chunks, and the length at which rotary embeddings change, are short, so that short prompts exceed them.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    layers = text.num_hidden_layers
    kept = _layers(text)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == layers and not name.startswith("_"):
            setattr(text, name, [value[layer] for layer in kept])
    sizes = _sizes(text, ranks) | {"num_hidden_layers": len(kept), "num_kv_shared_layers": len(kept) // 2}
    for field, size in sizes.items():
        value = getattr(text, field, None)
        is_inner = size == INNER * ranks
        if isinstance(value, int) and not isinstance(value, bool) and (value > size or is_inner):
            setattr(text, field, size)
    for field in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(text, field, None)
        if isinstance(value, int) and value >= WORDS:
            setattr(text, field, 0)
    rope = getattr(text, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
        rope["original_max_position_embeddings"] = ROPE_BOUND
    return small


def _layers(text: Any) -> list[int]:
    """Return the first layers until each kind has come; where the last ones use others' keys, as many of these."""
    few = 2
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type"):
        kinds = getattr(text, name, None)
        if isinstance(kinds, list | tuple):
            few = max(few, *(list(kinds).index(kind) + 1 for kind in set(kinds)))
    dense = getattr(text, "first_k_dense_replace", None)
    if isinstance(dense, int) and dense < text.num_hidden_layers:
        few = max(few, dense + 1)
    layers = range(int(text.num_hidden_layers))
    if not getattr(text, "num_kv_shared_layers", None) or len(layers) < 2 * few:
        return [*layers[:few]]
    return [*layers[:few], *layers[-few:]]


def _sizes(text: Any, ranks: int) -> dict[str, int]:
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    shared = heads // key_heads
    few = heads
    if key_heads % ranks == 0 and key_heads > 2 * ranks:
        few = 2 * ranks * shared
    head_size = text.hidden_size // heads
    experts = max(8, 2 * (getattr(text, "n_group", None) or 1))
    return {
        "num_attention_heads": few,
        "num_key_value_heads": few // shared,
        "hidden_size": head_size * few,
        "word_embed_proj_dim": head_size * few,
        **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size", "n_inner"), INNER * ranks),
        **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp"), INNER * ranks),
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), experts),
        **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), experts // 2),
        **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), WORDS),
        "max_position_embeddings": CONTEXT,
        "original_max_position_embeddings": ROPE_BOUND,
        "sliding_window": WINDOW,
        "attention_chunk_size": CHUNK,
        "index_topk": 16,
    }
