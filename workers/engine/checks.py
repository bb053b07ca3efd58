"""Which requests an engine can never serve; told to the caller before anything is queued. Called by `Engine.submit`."""

from __future__ import annotations

from stratakv.errors import ContextTooLong, InvalidRequest
from workers.engine.config import EngineConfig
from workers.engine.model_config import ModelFacts
from workers.engine.requests import EngineRequest


def check_request(request: EngineRequest, config: EngineConfig, facts: ModelFacts) -> None:
    """Raises InvalidRequest or ContextTooLong."""
    num_known = len(request.token_ids) + len(request.resume_token_ids)
    length = len(request.token_ids) + request.sampling.max_tokens
    capacity = config.num_blocks * config.block_size
    if not request.token_ids:
        raise InvalidRequest("The prompt is empty.", param="prompt")
    if len(request.resume_token_ids) >= request.sampling.max_tokens:
        raise InvalidRequest("All of max_tokens has been generated already.", param="max_tokens")
    if length > facts.max_model_len:
        raise ContextTooLong(
            f"{len(request.token_ids)} prompt tokens and {request.sampling.max_tokens} output tokens exceed the "
            f"model's context of {facts.max_model_len} tokens."
        )
    if length > capacity:
        raise ContextTooLong(f"{length} tokens can never fit this worker's KV cache of {capacity} tokens.")
    if len(request.keys) != num_known // config.block_size:
        raise InvalidRequest(f"{len(request.keys)} block keys do not cover {num_known} tokens.", param="keys")
    if not all(0 <= token < facts.vocab_size for token in (*request.token_ids, *request.resume_token_ids)):
        raise InvalidRequest(f"Token ids must be below {facts.vocab_size}.", param="prompt")
    if request.sampling.min_tokens and request.structure is not None:
        raise InvalidRequest("An answer with a form ends when it is whole.", param="min_tokens")
    if not all(0 <= token < facts.vocab_size for token in request.sampling.stop_token_ids):
        raise InvalidRequest(f"Token ids must be below {facts.vocab_size}.", param="stop_token_ids")
    if not all(0 <= token < facts.vocab_size for token, _ in request.sampling.logit_bias):
        raise InvalidRequest(f"Token ids must be below {facts.vocab_size}.", param="logit_bias")
