"""What a sampled token means for its request: told to it, or its end, or both. Called by the engine after each step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from stratakv.errors import StrataError
from workers.engine.requests import FinishReason, TokenEvent
from workers.engine.sampler import Sample
from workers.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class End:
    """Why a request is over."""

    reason: FinishReason
    error: StrataError | None = None
    stop_token_id: int | None = None
    """The token that ended it; not told unless the request wants that."""


def take_token(
    sequence: Sequence, sampled: Sample, eos_token_ids: Collection[int]
) -> tuple[TokenEvent | None, End | None]:
    """Append the token."""
    sampling, structure = sequence.request.sampling, sequence.request.structure
    index = sequence.output_index
    sequence.append(sampled.token_id)
    is_eos = sampled.token_id in eos_token_ids and (not sampling.ignore_eos or structure is not None)
    # An answer that was generated elsewhere up to the end of its form gets no further token.
    was_finished = structure is not None and structure.is_finished
    event = TokenEvent(sequence.request_id, sampled.token_id, index, sampled.logprob, sampled.top_logprobs)
    is_stop = sampled.token_id in sampling.stop_token_ids
    if is_eos or was_finished or is_stop:
        is_told = is_stop and sampling.tells_stop_token and not was_finished
        return event if is_told else None, End(FinishReason.STOP, stop_token_id=sampled.token_id)
    try:
        is_whole = structure is not None and structure.take(sampled.token_id)
    except StrataError as error:
        return event, End(FinishReason.ERROR, error)
    if is_whole:
        return event, End(FinishReason.STOP)
    return event, End(FinishReason.LENGTH) if index + 1 >= sampling.max_tokens else None
