"""The engines that a replica can run. Only here are torch, transformers and deepspeed imported, when they are used."""

from __future__ import annotations

from mii_hpc.engine.base import Engine, EngineSpec


def create_engine(spec: EngineSpec) -> Engine:
    """Return the engine that the model's `inference_engine_config.engine` names, not yet loaded."""
    if spec.model.inference_engine_config.engine == "echo":
        from mii_hpc.engine.echo import EchoEngine

        return EchoEngine(spec)
    from mii_hpc.engine.batching import BatchingEngine

    return BatchingEngine(spec)
