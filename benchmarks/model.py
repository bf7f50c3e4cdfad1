"""Llamas of random weights, with a tokenizer of their own, for where nothing can be downloaded."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 32_000
TEXTS = list(topics.values())


class Shape(NamedTuple):
    """What differs between Llamas. The vocabulary of the model may be larger than the tokenizer's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int = 128_256
    max_position_embeddings: int = 8192
    rope_theta: float = 500_000.0


SHAPES = {
    "250m": Shape(1024, 2816, 16, 16, 8, VOCABULARY, 2048, 10_000.0),
    "8b": Shape(4096, 14336, 32, 32, 8),
    "70b": Shape(8192, 28672, 80, 64, 8),
}


def random_llama(folder: Path, size: str = "250m", files: int = 1) -> Path:
    """Save a model in bfloat16, in about so many files, unless it is there; return its folder."""
    if (folder / "tokenizer.json").exists():
        return folder
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[size]._asdict(), bos_token_id=0, eos_token_id=1, tie_word_embeddings=False)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    bytes_ = 2 * sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=bytes_ // files + 1)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, every_byte = ["<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=every_byte, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
