"""Answers held to a form: a JSON schema, a list of choices or a regular expression, as masks over the next token.

`Structures` belongs to a worker and compiles what requests ask for, off the engine's thread; the `Structure` of a request is
used by the engine's step only. A mask is computed beside the forward pass, so that requests without one do not wait for it.
"""

from __future__ import annotations

import enum
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from stratakv.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerFast

COMPILED_MAX = 32
"""Compiled forms kept for the next request; the rows of a statement share one."""
REASON_CHARS_MAX = 300
_GRAMMAR_SIZE_MAX = 50_000
_LEXER_STATES_MAX = 50_000
_JSON_FORM = {
    # One way to set the spaces: a small model that may write any amount of them sometimes never stops.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # All but \u: every character can be written as itself, and \u0000 is one that databases cannot hold.
    "json_allowed_escapes": '"\\bfnrt',
}


class FormKind(enum.StrEnum):
    """Which of the forms it is; the name of the field that asks for it."""

    JSON = "json"
    CHOICE = "choice"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer must look like."""

    kind: FormKind
    text: str
    """A JSON schema or a list of strings, as JSON; or a regular expression."""


class Structure:
    """How far one answer has got in its form."""

    __slots__ = ("_matcher", "_vocab_size")

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    @property
    def is_finished(self) -> bool:
        """Nothing can follow."""
        return self._matcher.is_stopped()

    def allowed(self) -> torch.Tensor | None:
        """Ids of the tokens that may come next, ascending; None once finished. Raises InvalidRequest."""
        if self.is_finished:
            return None
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        token_ids = np.flatnonzero(np.unpackbits(mask, bitorder="little")[: self._vocab_size])
        if not len(token_ids):
            raise InvalidRequest("structured_outputs: no token of this model fits", param="structured_outputs")
        return torch.from_numpy(token_ids)

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take the next tokens. Raises InvalidRequest if they do not fit."""
        if not self._matcher.consume_tokens(list(token_ids)):
            self._check()
            raise InvalidRequest("structured_outputs: the tokens so far do not fit", param="structured_outputs")

    def take(self, token_id: int) -> bool:
        """Take the next token; whether the answer is whole with it. Raises InvalidRequest."""
        self.advance([token_id])
        return self.is_finished

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _tidy(self._matcher.get_error())
            raise InvalidRequest(f"structured_outputs: {reason}", param="structured_outputs")


class Structures:
    """Compiles forms for one model. May be called from several threads; the first call takes half a second."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._prepared: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[Form, str | None], LLMatcher] = OrderedDict()

    def structure(self, form: Form, resumed: Sequence[int] = (), salt: str | None = None) -> Structure:
        """Where an answer in this form stands after `resumed`. Raises InvalidRequest that says what is wrong with it.

        As with KV, what is compiled is found by requests with the same salt only: how long it takes would tell of it.
        """
        with self._lock:
            matcher = self._compiled.pop((form, salt), None) or self._compile(form)
            self._compiled[form, salt] = matcher
            if len(self._compiled) > COMPILED_MAX:
                self._compiled.popitem(last=False)
            structure = Structure(matcher.deep_copy(), self._vocab_size)
        structure.advance(resumed)
        return structure

    def _compile(self, form: Form) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_grammar_size=_GRAMMAR_SIZE_MAX, max_lexer_states=_LEXER_STATES_MAX, verbose_errors=False
        )
        try:
            grammar = _grammar(form)
            if self._prepared is None:
                self._prepared = self._prepare()
            matcher = LLMatcher(self._prepared, grammar, log_level=0, limits=limits)
        except (ValueError, RecursionError) as error:
            raise _wrong(form, str(error)) from None
        if not matcher.is_error():
            matcher.compute_bitmask()  # every answer starts from what it learns by that
        if matcher.is_error():
            raise _wrong(form, matcher.get_error())
        return matcher

    def _prepare(self) -> LLTokenizer:
        from llguidance.hf import from_tokenizer

        num_tokens = max(self._vocab_size, self._tokenizer.backend_tokenizer.get_vocab_size())
        return from_tokenizer(self._tokenizer, n_vocab=num_tokens, eos_token=self._eos_token_ids or None)


def _grammar(form: Form) -> str:
    from llguidance import LLMatcher

    if form.kind is FormKind.JSON:
        return LLMatcher.grammar_from_json_schema(form.text, overrides=_JSON_FORM)  # type: ignore[arg-type]
    if form.kind is FormKind.CHOICE:
        return LLMatcher.grammar_from_lark(
            "start: " + " | ".join(json.dumps(choice) for choice in json.loads(form.text))
        )
    return LLMatcher.grammar_from_regex(form.text)


def _wrong(form: Form, reason: str) -> InvalidRequest:
    field = f"structured_outputs.{form.kind.value}"
    what = {FormKind.JSON: "JSON schema", FormKind.CHOICE: "list of choices", FormKind.REGEX: "regular expression"}
    return InvalidRequest(f"the {what[form.kind]} cannot be used: {_tidy(reason)}", param=field)


def _tidy(reason: str) -> str:
    return reason.replace("<non-verbose/>", "").strip()[:REASON_CHARS_MAX]
