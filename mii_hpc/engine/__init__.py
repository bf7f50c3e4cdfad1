"""The engines that a replica can run. Only here are torch, transformers and deepspeed imported, when they are used."""

from __future__ import annotations

import os

from mii_hpc.config import ModelConfig
from mii_hpc.engine.base import Codec, Engine, EngineSpec


def create_engine(spec: EngineSpec) -> Engine:
    """Return the engine that the model's `inference_engine_config.engine` names, not yet loaded."""
    if spec.model.inference_engine_config.engine == "echo":
        from mii_hpc.engine.echo import EchoEngine

        return EchoEngine(spec)
    # A waiting thread spins for about a millisecond, then sleeps; OpenMP reads this when torch is first imported.
    # Within a step the next piece of work is there sooner than a sleeper could be woken (where none spun, two threads
    # were hardly faster than one); for longer, as is the default, they would take the cores from those who serve.
    os.environ.setdefault("GOMP_SPINCOUNT", "100000")
    from mii_hpc.engine.batching import BatchingEngine

    return BatchingEngine(spec)


def codec_of(engine: Engine, model: ModelConfig) -> Codec:
    """Return the codec of an engine that has loaded the model."""
    from mii_hpc.engine.echo import EchoEngine

    if isinstance(engine, EchoEngine):
        return engine.codec
    from mii_hpc.engine.tokenizer import TokenizerCodec

    return TokenizerCodec(engine.tokenizer, model)
