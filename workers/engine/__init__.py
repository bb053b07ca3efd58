"""The paged torch engine: continuous batching over a prefix-cached KV cache, with layer-wise loads and write-downs."""

from workers.engine.config import EngineConfig, EngineDtype
from workers.engine.engine import Engine
from workers.engine.model_config import ModelFacts
from workers.engine.requests import (
    EngineEvent,
    EngineRequest,
    FinishedEvent,
    FinishReason,
    OnEvent,
    RequestUsage,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
)
from workers.engine.stats import EngineStats

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineDtype",
    "EngineEvent",
    "EngineRequest",
    "EngineStats",
    "FinishReason",
    "FinishedEvent",
    "ModelFacts",
    "OnEvent",
    "RequestUsage",
    "SamplingParams",
    "TokenEvent",
    "TokenLogprob",
]
