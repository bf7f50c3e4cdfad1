"""A model's tokenizer: from prompts to token ids, and back to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer

from mii_hpc.config import ModelConfig
from mii_hpc.engine.text import Detokenizer
from mii_hpc.errors import ConfigError, InvalidRequestError


class Tokenizer:
    """Encodes prompts and decodes answers. Not safe for several threads that encode at once.

    Attributes:
        vocabulary: how many token ids the model knows.
        eos_token_ids: those that end an answer.
        pretrained: transformers' own tokenizer.
    """

    def __init__(self, model: ModelConfig, vocabulary: int, eos_token_ids: Sequence[int]) -> None:
        """Load it; without `eos_token_ids` it has its own. Raises ConfigError if there is none."""
        self.pretrained: Any = _load(model)
        own = self.pretrained.eos_token_id
        self.vocabulary = vocabulary
        self.eos_token_ids = tuple(eos_token_ids) or (() if own is None else (int(own),))
        tokens: dict[str, int] = self.pretrained.get_vocab()
        names = (f"<0x{byte:02X}>" for byte in range(256))
        self._byte_tokens = frozenset(tokens[name] for name in names if name in tokens)

    def encode(self, prompt: str) -> list[int]:
        """Return a prompt's token ids, at least one. Raises InvalidRequestError if it has none, or has unknown ones."""
        token_ids: list[int] = self.pretrained(prompt)["input_ids"]
        if not token_ids and self.pretrained.bos_token_id is not None:
            token_ids = [self.pretrained.bos_token_id]
        if not token_ids:
            raise InvalidRequestError("the prompt is empty")
        if max(token_ids) >= self.vocabulary:
            raise InvalidRequestError(f"the model does not know the prompt's token {max(token_ids)}")
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, special ones left out and spaces as they are."""
        if getattr(self.pretrained, "is_fast", False):
            return str(self.pretrained.backend_tokenizer.decode(token_ids, skip_special_tokens=True))
        return str(self.pretrained.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def detokenizer(self, after: Sequence[int] = ()) -> Detokenizer:
        """Return what decodes one answer, token by token, as the text that comes after these tokens."""
        return Detokenizer(self.decode, self._byte_tokens, after)


def _load(model: ModelConfig) -> Any:
    name = model.tokenizer or model.model_name_or_path
    if not isinstance(name, str):
        return name
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"tokenizer='{name}': {error}") from error
