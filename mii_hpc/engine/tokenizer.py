"""A model's tokenizer: from prompts to token ids, and back to text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Self

from jinja2 import TemplateError
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, GenerationConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mii_hpc.config import GenerateParamsConfig, ModelConfig
from mii_hpc.engine.text import REPLACEMENT, ByteDetokenizer, Detokenizer, TextSource
from mii_hpc.errors import ConfigError, InvalidRequestError
from mii_hpc.generation import Chat, Description, Prompt, Tokenization

RECOMMENDED = ("temperature", "top_p", "top_k", "repetition_penalty")
"""What a model's generation_config may recommend for requests."""


class TokenizerCodec:
    """A tokenizer of transformers with a model's settings. Not safe for several threads that encode at once.

    Attributes:
        pretrained: transformers' own tokenizer.
    """

    def __init__(self, pretrained: Any, model: ModelConfig) -> None:
        self.pretrained = pretrained
        self._model = model
        tokens: dict[str, int] = pretrained.get_vocab()
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        self._longest = max((len(token.encode()) for token in tokens), default=1)
        self._bytes = {tokens[name]: byte for name, byte in names.items() if name in tokens}

    def encode(self, prompt: Prompt, plain: bool = False, room: int | None = None) -> list[int]:
        """Return a prompt's token ids, at least one. Raises InvalidRequestError if it has none.

        `plain` leaves out the special tokens that a prompt begins or ends with. A chat template writes its own. Where
        there is `room` for so many tokens, a prompt that is too long for as many of the longest is refused at once.
        """
        if isinstance(prompt, tuple):
            return list(prompt)
        if isinstance(prompt, Chat):
            prompt, plain = self._rendered(prompt), True
        if room is not None and (size := len(prompt.encode())) > room * self._longest:
            raise InvalidRequestError(
                f"the prompt has {size} bytes, and {room} tokens, of at most {self._longest} bytes each, are allowed"
            )
        token_ids: list[int] = self.pretrained(prompt, add_special_tokens=not plain)["input_ids"]
        begins = self.pretrained.bos_token
        # A prompt that a chat template has made begins with it already.
        if begins and prompt.startswith(begins) and not prompt.startswith(begins * 2):
            twice = token_ids[:2] == [self.pretrained.bos_token_id] * 2
            token_ids = token_ids[1:] if twice else token_ids
        if not token_ids and self.pretrained.bos_token_id is not None:
            token_ids = [self.pretrained.bos_token_id]
        if not token_ids:
            raise InvalidRequestError("the prompt is empty")
        return token_ids

    def tokenize(self, prompt: Prompt, plain: bool = False) -> Tokenization:
        """See Codec."""
        token_ids = self.encode(prompt, plain, self._model.max_length)
        try:
            text = str(self.pretrained.decode(token_ids, clean_up_tokenization_spaces=False))
            return Tokenization(tuple(token_ids), text, tuple(self._bytes_of(token_id) for token_id in token_ids))
        except (OverflowError, IndexError) as error:
            raise InvalidRequestError(f"token ids: one is unknown to the tokenizer: {error}") from None

    def describe(self) -> Description:
        """See Codec."""
        pretrained = self.pretrained
        return Description(
            max_length=self._model.max_length,
            defaults=_recommended(self._model),
            chat_template=pretrained.chat_template if isinstance(pretrained.chat_template, str) else None,
            tokenizer={
                "class": type(pretrained).__name__,
                "vocabulary": len(pretrained),
                "bos_token": pretrained.bos_token,
                "eos_token": pretrained.eos_token,
                "pad_token": pretrained.pad_token,
            },
        )

    def _rendered(self, chat: Chat) -> str:
        if not self.pretrained.chat_template:
            raise InvalidRequestError(
                "messages: the model's tokenizer has no chat template; serve it with `chat_template`, or send a prompt"
            )
        try:
            return str(
                self.pretrained.apply_chat_template(
                    [dict(message) for message in chat.messages],
                    tokenize=False,
                    add_generation_prompt=not chat.continues,
                    continue_final_message=chat.continues,
                    **chat.arguments,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise InvalidRequestError(f"messages: the chat template refuses them: {error}") from error

    def _bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of one token: a piece of a character has some, too."""
        if token_id in self._bytes:
            return bytes([self._bytes[token_id]])
        # Behind another one, so that a decoder that drops a text's first space leaves this one's.
        before, both = (str(self.pretrained.decode(ids)) for ids in ([token_id], [token_id, token_id]))
        text = both.removeprefix(before)
        if REPLACEMENT not in both:
            return text.encode()
        token = self.pretrained.convert_ids_to_tokens(token_id)
        return text.encode() if token is None else _bytes_at_byte_level(token, text)


class Tokenizer(TokenizerCodec):
    """The tokenizer of a model that is loaded.

    Attributes:
        vocabulary: how many token ids the model knows.
        eos_token_ids: those that end an answer.
    """

    def __init__(self, model: ModelConfig, vocabulary: int, eos_token_ids: Sequence[int]) -> None:
        """Load it; without `eos_token_ids` it has its own. Raises ConfigError if there is none."""
        super().__init__(_load(model), model)
        own = self.pretrained.eos_token_id
        self.vocabulary = vocabulary
        self.eos_token_ids = tuple(eos_token_ids) or (() if own is None else (int(own),))
        backend = getattr(self.pretrained, "backend_tokenizer", None)
        self._token_bytes: dict[bool, _TokenBytes] = {}
        if backend is not None and type(backend.decoder) is ByteLevel:
            self._token_bytes = {skips: _TokenBytes(backend, skips) for skips in (False, True)}
        # Each token of an answer is decoded alone once, as what comes before the next.
        self._alone: dict[tuple[int, bool], str] = {}

    def encode(self, prompt: Prompt, plain: bool = False, room: int | None = None) -> list[int]:
        """Return a prompt's token ids, at least one. Raises InvalidRequestError if it has none, or has unknown ones."""
        token_ids = super().encode(prompt, plain, room)
        self.check(token_ids)
        return token_ids

    def check(self, token_ids: Sequence[int]) -> None:
        """Raise InvalidRequestError for a token that the model does not know."""
        unknown = next((token_id for token_id in token_ids if not 0 <= token_id < self.vocabulary), None)
        if unknown is not None:
            raise InvalidRequestError(f"the model does not know the prompt's token {unknown}")

    def copy(self) -> Self:
        """Return another that encodes the same, for use on another thread."""
        other = copy.copy(self)
        # What is kept of single tokens stays in common: a deep copy fails where another thread adds some meanwhile.
        other.pretrained = copy.deepcopy(self.pretrained)
        return other

    def ends(self, params: GenerateParamsConfig) -> frozenset[int]:
        """Return the tokens that end an answer; a stop string that is a special token is one of them.

        Raises InvalidRequestError for one that the model does not know.
        """
        for token_id in params.stop_token_ids:
            if token_id >= self.vocabulary:
                raise InvalidRequestError(
                    f"stop_token_ids={token_id}: the model knows {self.vocabulary} tokens, from 0 on"
                )
        added = self.pretrained.added_tokens_decoder
        special = {str(token): token_id for token_id, token in added.items() if token.special}
        named = [special[text] for text in params.stop if text in special]
        return frozenset((*params.stop_token_ids, *named, *(() if params.ignore_eos else self.eos_token_ids)))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of token ids, spaces as they are."""
        if len(token_ids) != 1:
            return self._decode(token_ids, skip_special_tokens)
        key = token_ids[0], skip_special_tokens
        if key not in self._alone:
            self._alone[key] = self._decode(token_ids, skip_special_tokens)
        return self._alone[key]

    def _decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if getattr(self.pretrained, "is_fast", False):
            return str(self.pretrained.backend_tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
        return str(
            self.pretrained.decode(
                token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def detokenizer(self, after: Sequence[int] = (), skip_special_tokens: bool = True) -> TextSource:
        """Return what decodes one answer, token by token, as the text that comes after these tokens."""
        if self._token_bytes:
            return ByteDetokenizer(self._token_bytes[skip_special_tokens].__getitem__)
        decode = partial(self.decode, skip_special_tokens=skip_special_tokens)
        return Detokenizer(decode, frozenset(self._bytes), after)


class _TokenBytes(dict[int, bytes]):
    """The bytes of each token of a byte-level vocabulary, from the first time on that they are asked for.

    As the decoder of the tokenizers library takes them: special tokens have none where it `skips` them.
    """

    def __init__(self, backend: Any, skips: bool) -> None:
        super().__init__()
        self._backend, self._skips = backend, skips

    def __missing__(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        silent = token is None or (self._skips and not self._backend.decode([token_id], skip_special_tokens=True))
        self[token_id] = b"" if silent else _bytes_at_byte_level(token, token)
        return self[token_id]


def _bytes_at_byte_level(token: str, text: str) -> bytes:
    """Return what a token's characters stand for in a byte-level vocabulary; a `text` where one stands for nothing."""
    alphabet = _byte_alphabet()
    known = all(character in alphabet for character in token)
    return bytes(alphabet[character] for character in token) if known else text.encode()


def _load(model: ModelConfig) -> Any:
    name = model.tokenizer or model.model_name_or_path
    if not isinstance(name, str):
        return name
    try:
        loaded = AutoTokenizer.from_pretrained(name, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"tokenizer='{name}': {error}") from error
    loaded.chat_template = model.chat_template or loaded.chat_template
    return loaded


def _recommended(model: ModelConfig) -> dict[str, Any]:
    """Return the options of a request that the model's generation_config sets."""
    try:
        config = GenerationConfig.from_pretrained(model.model_name_or_path).to_diff_dict()
    except (OSError, ValueError):  # it has none
        return {}
    return {name: config[name] for name in RECOMMENDED if config.get(name) is not None}


@cache
def _byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
