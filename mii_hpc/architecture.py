"""What the shape of a deployment depends on in a model's config, read alike on the login node and in the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from mii_hpc.errors import ConfigError
from mii_hpc.printable import one_line

MOST_RANKS = 1024
"""As ModelConfig bounds tensor_parallel."""
_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")

_STATE = "it keeps a state besides keys and values, which no paged KV cache can hold"
_INDEXER = "its indexer keeps keys of its own besides the KV cache"
_STATEFUL = (
    "mamba mamba2 falcon_mamba rwkv xlstm recurrent_gemma jamba bamba zamba zamba2 falcon_h1 nemotron_h zaya lfm2 lfm3 "
    "granitemoehybrid olmo_hybrid bailing_hybrid kimi_linear minimax qwen3_next qwen3_5_text qwen3_5_moe_text lfm2_moe"
)
_UNSERVED = {
    **dict.fromkeys(_STATEFUL.split(" "), _STATE),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), _INDEXER),
    "openai-gpt": "it keeps no keys and values",
    "reformer": "its attention is over hashes of whole sequences",
}
"""Types of models that cannot be served, and why."""
_UNSHARDED = frozenset(
    ("bart", "bitnet", "bloom", "codegen", "ctrl", "doge", "gpt2", "llama4_text", "longcat_flash", "persimmon")
)
"""Types of models that neither DeepSpeed nor transformers' plan shards right."""
_STATEFUL_LAYERS = ("linear", "mamba", "conv", "recurrent", "ssm")


@dataclass(frozen=True)
class Architecture:
    """Attention heads, KV heads, and the context in tokens; None where the config does not say.

    `refused` is why such a model cannot be served, as far as its config tells; `unsharded` is its type where several
    ranks cannot share it.
    """

    heads: int | None
    key_value_heads: int | None
    context: int | None
    refused: str | None = None
    unsharded: str | None = None

    @classmethod
    def read(cls, get: Callable[[str], Any]) -> Self:
        """Read it from the config of the text model; `get` returns the value of a field, None where it has none."""

        def first(names: tuple[str, ...]) -> int | None:
            values = (get(name) for name in names)
            return next((value for value in values if isinstance(value, int) and 0 < value < 2**63), None)

        kind = get("model_type")
        unsharded = kind if isinstance(kind, str) and kind in _UNSHARDED else None
        return cls(first(_HEADS), first(_KEY_VALUE_HEADS), first(_CONTEXT), _refused(get), unsharded)

    def check_served(self) -> None:
        """Raise ConfigError for a model that cannot be served."""
        if self.refused is not None:
            raise ConfigError(self.refused)

    def check_tensor_parallel(self, ranks: int) -> None:
        """Raise ConfigError unless so many ranks can share the heads evenly; several may hold the same KV head."""
        if self.unsharded and ranks > 1:
            raise ConfigError(
                f"tensor_parallel={ranks}: models of the type '{self.unsharded}' cannot be sharded; use "
                "tensor_parallel=1"
            )
        heads, key_value_heads = self.heads, self.key_value_heads

        def fits(count: int) -> bool:
            key_values = key_value_heads is None or key_value_heads % count == 0 or count % key_value_heads == 0
            return key_values and (heads is None or heads % count == 0)

        if not fits(ranks):
            allowed = ", ".join(
                str(n) for n in range(1, min(MOST_RANKS, max(heads or 1, key_value_heads or 1)) + 1) if fits(n)
            )
            kind, count = ("attention heads", heads) if heads and heads % ranks else ("KV heads", key_value_heads)
            raise ConfigError(
                f"tensor_parallel={ranks}: does not divide the model's {count} {kind}; allowed are {allowed}"
            )


def _refused(get: Callable[[str], Any]) -> str | None:
    kind = get("model_type")
    kinds = get("layer_types")
    reason = _UNSERVED.get(kind) if isinstance(kind, str) else None
    if get("is_encoder_decoder"):
        reason = "it is an encoder with a decoder"
    if isinstance(kinds, list | tuple) and any(part in str(name) for name in kinds for part in _STATEFUL_LAYERS):
        reason = _STATE
    return f"models of the type '{one_line(kind)}' cannot be served: {reason}" if reason else None
