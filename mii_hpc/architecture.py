"""What the shape of a deployment depends on in a model's config, read alike on the login node and in the engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from mii_hpc.errors import ConfigError

_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")


@dataclass(frozen=True)
class Architecture:
    """Attention heads, KV heads, and the context in tokens; None where the config does not say."""

    heads: int | None
    key_value_heads: int | None
    context: int | None

    @classmethod
    def read(cls, get: Callable[[str], Any]) -> Self:
        """Read it from the config of the text model; `get` returns the value of a field, None where it has none."""

        def first(names: tuple[str, ...]) -> int | None:
            values = (get(name) for name in names)
            return next((value for value in values if isinstance(value, int) and value > 0), None)

        return cls(first(_HEADS), first(_KEY_VALUE_HEADS), first(_CONTEXT))

    def check_tensor_parallel(self, ranks: int) -> None:
        """Raise ConfigError unless so many ranks can share the heads evenly."""
        counts = [count for count in (self.heads, self.key_value_heads) if count is not None]
        for kind, count in (("attention heads", self.heads), ("KV heads", self.key_value_heads)):
            if count is not None and count % ranks:
                allowed = (n for n in range(1, count + 1) if all(each % n == 0 for each in counts))
                raise ConfigError(
                    f"tensor_parallel={ranks}: does not divide the model's {count} {kind}; "
                    f"allowed are {', '.join(map(str, allowed))}"
                )
