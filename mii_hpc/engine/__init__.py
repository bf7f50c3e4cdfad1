"""The engines that a replica can run. Only here are torch, transformers and deepspeed imported, when they are used."""

from __future__ import annotations

from collections.abc import Callable

from mii_hpc.config import ModelConfig
from mii_hpc.engine.base import Codec, Engine, EngineSpec


def import_engine(model: ModelConfig) -> Callable[[EngineSpec], Engine]:
    """Return the class of the engine that the model's `inference_engine_config.engine` names. May take seconds."""
    if model.inference_engine_config.engine == "echo":
        from mii_hpc.engine.echo import EchoEngine

        return EchoEngine
    from mii_hpc.engine.batching import BatchingEngine

    return BatchingEngine


def create_engine(spec: EngineSpec) -> Engine:
    """Return the engine that the model names, not yet loaded."""
    return import_engine(spec.model)(spec)


def codec_of(engine: Engine, model: ModelConfig) -> Codec:
    """Return the codec of an engine that has loaded the model."""
    from mii_hpc.engine.echo import EchoEngine

    if isinstance(engine, EchoEngine):
        return engine.codec
    from mii_hpc.engine.tokenizer import TokenizerCodec

    return TokenizerCodec(engine.tokenizer, model.model_copy(update={"max_length": engine.context}))
