"""The same history as the same tokens, turn after turn, so that its KV is found again. Free of I/O.

The tokens that a model has generated need not be those that its text would be cut into. So an answer keeps them, with those of
the prompt before it. The next prompt begins with exactly these, as long as its text begins with the text that they stood for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dbnode.conversations.values import Item, KeptTokens
from stratakv.text import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CANDIDATES_MAX = 4
"""Answers, from the last one back, whose text is compared."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """What is known of a prompt's tokens before it is tokenised."""

    token_ids: tuple[int, ...] = ()
    end_chars: int = 0
    position: int | None = None
    """The answer that kept them."""


class History:
    """Of one model's tokenizer and chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        backend = tokenizer.backend_tokenizer
        self._special = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self._fingerprint = hashlib.sha256(backend.to_str().encode()).digest()

    def beginning(self, items: Sequence[Item], text: str) -> Beginning:
        """The longest beginning of a prompt's text whose tokens are kept."""
        kept = {item.position: item.message.kept for item in items if item.message.kept is not None}
        for position in sorted(kept, reverse=True)[:CANDIDATES_MAX]:
            end_chars = kept[position].end_chars
            if end_chars <= len(text) and self._digest(text[:end_chars]) == kept[position].text_digest:
                chain = _chain(kept, position)
                if chain is not None:
                    return Beginning(chain, end_chars, position)
        return Beginning()

    def kept(
        self, begin: Beginning, prompt_text: str, prompt_ids: Sequence[int], answer: str, generated: Sequence[int]
    ) -> KeptTokens | None:
        """What an answer keeps; None where its tokens say something else than its text, as after a stop string."""
        generated = list(generated)
        while generated and generated[-1] in self._special:
            generated.pop()
        if decode(self._tokenizer, generated) != answer:
            return None
        text = prompt_text + answer
        new = (*prompt_ids[len(begin.token_ids) :], *generated)
        return KeptTokens(new, begin.position, len(text), self._digest(text))

    def _digest(self, text: str) -> bytes:
        return hashlib.sha256(self._fingerprint + text.encode()).digest()


def _chain(kept: dict[int, KeptTokens], position: int) -> tuple[int, ...] | None:
    """All tokens up to the end of an answer; None if a part of them is missing."""
    parts: list[tuple[int, ...]] = []
    place: int | None = position
    while place is not None:
        part = kept.get(place)
        if part is None or (part.after_position is not None and part.after_position >= place):
            return None
        parts.append(part.token_ids)
        place = part.after_position
    return tuple(token for part in reversed(parts) for token in part)
