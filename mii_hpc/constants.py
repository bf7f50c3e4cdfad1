"""The enumerations of DeepSpeed-MII's module of this name. Each member equals its string. Imports no other module."""

from __future__ import annotations

from enum import StrEnum


class TaskType(StrEnum):
    """What a model is served for."""

    TEXT_GENERATION = "text-generation"


class DeploymentType(StrEnum):
    """Where DeepSpeed-MII deploys. Here serve() makes a persistent deployment, and pipeline() the other kind."""

    LOCAL = "local"
    AML = "aml"
    NON_PERSISTENT = "non-persistent"


class GenerationFinishReason(StrEnum):
    """Why an answer has ended; NONE while it goes on."""

    STOP = "stop"
    """At the end-of-sequence token or a stop string."""
    LENGTH = "length"
    """At a bound on its length."""
    NONE = "none"
