"""What the shape of a deployment depends on in a model's config, read alike on the login node and in the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    "granitemoehybrid olmo_hybrid bailing_hybrid kimi_linear minimax qwen3_next qwen3_5_text qwen3_5_moe_text lfm2_moe "
    "qwen4_exp_text inkling_text inkling2_text"
)
_INDEXED = "deepseek_v32 glm_moe_dsa axk2 hy_v4 dots3_note dots3_note_text"
_UNSERVED = {
    **dict.fromkeys(_STATEFUL.split(" "), _STATE),
    **dict.fromkeys(_INDEXED.split(" "), _INDEXER),
    "deepseek_v4": "it keeps compressed keys besides the KV cache",
    "blt": "it makes patches of bytes with a model of its own",
    "openai-gpt": "it keeps no keys and values",
    "reformer": "its attention is over hashes of whole sequences",
}
"""Types of models that cannot be served, and why."""
_UNSHARDED = frozenset(
    ("bart", "bitnet", "bloom", "codegen", "ctrl", "doge", "gpt2", "llama4_text", "longcat_flash", "persimmon")
)
"""Types of models that neither DeepSpeed nor transformers' plan shards right."""
CAUSAL_TYPES = (
    "afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bert-generation big_bird "
    "bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom blt camembert codegen cohere cohere2 cohere2_moe "
    "cohere_compass_text cpmant ctrl cwm data2vec-text dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 "
    "diffllama doge dots1 dots3_note dots3_note_text electra emu3 ernie ernie4_5 ernie4_5_moe exaone4 exaone_moe "
    "falcon falcon_h1 falcon_mamba flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text gemma4 "
    "gemma4_assistant gemma4_text gemma4_unified gemma4_unified_assistant gemma4_unified_text git glm glm4 glm4_moe "
    "glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj "
    "granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hrm_text hunyuan_v1_dense "
    "hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_text inkling_text internlm3 iquestcoder jais2 jamba jetmoe "
    "kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4 llama4_text longcat_flash mamba mamba2 marian mbart "
    "megatron-bert mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral ministral3 mistral "
    "mixtral mllama modernbert-decoder moshi moss_transcribe_diarize mpt musicgen musicgen_melody mvp nanochat "
    "nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phi4_multimodal "
    "phimoe plbart prophetnet qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe "
    "qwen3_next qwen4_exp qwen4_exp_text recurrent_gemma reformer rembert roberta roberta-prelayernorm roc_bert "
    "roformer rwkv seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlm xlm-roberta "
    "xlm-roberta-xl xlnet xlstm xmod youtu zamba zamba2 zaya"
)
"""Types of models that transformers, in the version that the engine takes, makes a causal language model of."""
_ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod"
)
"""Types of models whose tokens attend to later ones, unless the config says `is_decoder`."""
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
        is_old_falcon = kind == "falcon" and not get("new_decoder_architecture")
        unsharded = kind if isinstance(kind, str) and (kind in _UNSHARDED or is_old_falcon) else None
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


def check_type(config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Raise ConfigError for a config.json whose type of model is none that the engine knows, or that brings its code.

    One that does not say its type is left to transformers, which guesses it from the folder's name.
    """
    kind = config.get("model_type")
    brings_code = "AutoModelForCausalLM" in (config.get("auto_map") or ())
    if not isinstance(kind, str) or kind in CAUSAL_TYPES.split(" ") or (brings_code and trust_remote_code):
        return
    instead = "; trust_remote_code=True runs the code that the model brings" if brings_code else ""
    raise ConfigError(
        f"model_type='{one_line(kind)}': none of transformers' types of causal language models, such as 'llama'"
        f"{instead}"
    )


def _refused(get: Callable[[str], Any]) -> str | None:
    kind = get("model_type")
    kinds = get("layer_types")
    reason = _UNSERVED.get(kind) if isinstance(kind, str) else None
    if isinstance(kind, str) and kind in _ENCODERS.split(" ") and not get("is_decoder"):
        reason = "its tokens attend to later ones, which are not known while it generates"
    if get("is_encoder_decoder"):
        reason = "it is an encoder with a decoder"
    if isinstance(kinds, list | tuple) and any(part in str(name) for name in kinds for part in _STATEFUL_LAYERS):
        reason = _STATE
    return f"models of the type '{one_line(kind)}' cannot be served: {reason}" if reason else None
