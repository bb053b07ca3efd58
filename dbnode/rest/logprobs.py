"""Log-probabilities of an answer's tokens in OpenAI's two forms: of chats, and of completions. Protocol code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dbnode.generate import TokenScore
from dbnode.rest.form import Form
from stratakv.token_text import TokenTexts


class LogprobsWriter:
    """Of one answer, which may come in pieces."""

    def __init__(self, form: Form, texts: TokenTexts, num_top: int) -> None:
        self._form = form
        self._texts = texts
        self._num_top = num_top
        self._offset = 0
        """Characters of the tokens before."""

    def write(self, token_ids: Sequence[int], scores: Sequence[TokenScore]) -> dict[str, Any]:
        """The `logprobs` object of these tokens, which come after those of the calls before."""
        write = self._chat if self._form is Form.CHAT else self._completion
        return write(list(zip(token_ids, scores, strict=True)))

    def _chat(self, tokens: list[tuple[int, TokenScore]]) -> dict[str, Any]:
        content = [
            self._entry(token_id, score.logprob) | {"top_logprobs": [self._entry(*top) for top in self._top(score)]}
            for token_id, score in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._texts.bytes_of(token_id)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    def _completion(self, tokens: list[tuple[int, TokenScore]]) -> dict[str, Any]:
        texts = [self._texts.text_of(token_id) for token_id, _ in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        tops = []
        for (token_id, score), text in zip(tokens, texts, strict=True):
            # The chosen token is among them even if it is none of the likeliest. Tokens that look the same count as one.
            top = {text: score.logprob} if self._num_top else {}
            for other, logprob in self._top(score):
                if other != token_id:
                    top.setdefault(self._texts.text_of(other), logprob)
            tops.append(top)
        logprobs = [score.logprob for _, score in tokens]
        return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, score: TokenScore) -> list[tuple[int, float]]:
        """The likeliest tokens, likeliest first."""
        return sorted(score.top, key=lambda top: -top[1])[: self._num_top]
