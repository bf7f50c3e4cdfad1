"""The engines that a replica can run. Only here are torch, transformers and deepspeed imported, when they are used."""

from __future__ import annotations

from mii_hpc.config import ModelConfig
from mii_hpc.engine.base import Codec, Engine, EngineSpec


def create_engine(spec: EngineSpec) -> Engine:
    """Return the engine that the model's `inference_engine_config.engine` names, not yet loaded."""
    if spec.model.inference_engine_config.engine == "echo":
        from mii_hpc.engine.echo import EchoEngine

        return EchoEngine(spec)
    from mii_hpc.engine.batching import BatchingEngine

    return BatchingEngine(spec)


def codec_of(engine: Engine, model: ModelConfig) -> Codec:
    """Return the codec of an engine that has loaded the model."""
    from mii_hpc.engine.echo import EchoEngine

    if isinstance(engine, EchoEngine):
        return engine.codec
    from mii_hpc.engine.tokenizer import TokenizerCodec

    return TokenizerCodec(engine.tokenizer, model.model_copy(update={"max_length": engine.context}))
