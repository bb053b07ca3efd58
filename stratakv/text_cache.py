"""Tokens of texts that come again: the history of a conversation is tokenised once, not at every turn.

A tokenizer treats what lies between two special tokens by itself, so a text cut before its special tokens can be tokenised
piece by piece, and the pieces remembered. Owned by the DB node; may be used by several threads.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from stratakv.text import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHARS_MAX = 32 * 1024 * 1024
"""Text remembered; its tokens take about as many bytes again."""


class CachingEncoder:
    """`stratakv.text.encode` without added special tokens, with a memory of at most `chars_max` characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chars_max: int = CHARS_MAX) -> None:
        self._tokenizer = tokenizer
        self._chars_max = chars_max
        self._cut = _cut_pattern(tokenizer)
        self._tokens: OrderedDict[tuple[str, str], list[int]] = OrderedDict()
        self._num_chars = 0
        self._lock = threading.Lock()

    def encode(self, text: str, owner: str = "") -> list[int]:
        """Tokens of `text`, the same as without the memory; how fast they come tells of texts of the same owner only."""
        token_ids: list[int] = []
        for piece in self._pieces(text):
            token_ids += self._piece(piece, owner)
        return token_ids

    def is_mostly_known(self, text: str, chars_max: int, owner: str = "") -> bool:
        """Whether at most `chars_max` characters of `text` would have to be tokenised."""
        with self._lock:
            return sum(len(piece) for piece in self._pieces(text) if (owner, piece) not in self._tokens) <= chars_max

    def _pieces(self, text: str) -> list[str]:
        if self._cut is None:
            return [text]
        cuts = [0, *(match.start() for match in self._cut.finditer(text)), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]

    def _piece(self, piece: str, owner: str) -> list[int]:
        key = owner, piece
        with self._lock:
            known = self._tokens.get(key)
            if known is not None:
                self._tokens.move_to_end(key)
                return known
        token_ids = encode(self._tokenizer, piece, special=False)
        with self._lock:
            if key not in self._tokens:
                self._tokens[key] = token_ids
                self._num_chars += len(piece)
            while self._num_chars > self._chars_max:
                self._num_chars -= len(self._tokens.popitem(last=False)[0][1])
        return token_ids


def _cut_pattern(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str] | None:
    """Matches the special tokens that stand by themselves in any surroundings; None if there are none to rely on."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    if any(token.lstrip or token.single_word or token.normalized for token in added):
        return None
    contents = sorted((token.content for token in added if token.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, contents))) if contents else None
