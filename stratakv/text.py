"""Between text and tokens: the model's tokenizer, its chat template, and text that grows while tokens arrive.

Used by the DB node, and by workers when they are spoken to with text. A `Detokenizer` belongs to one answer; a tokenizer may
be shared by threads, since only its backend is used, which is never reconfigured.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratakv.chat_messages import in_words, plain_messages
from stratakv.errors import InvalidRequest, SetupError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\ufffd"
"""What undecodable bytes become; also what a character becomes whose last bytes are still to come."""
PENDING_TOKENS_MAX = 8
"""More undecided tokens than this are no unfinished character; the undecodable ones among them are given up."""
CHARACTER_BYTES_MAX = 4
_REASON_CHARS_MAX = 300
"""Of what a chat template says is wrong."""


@dataclass(frozen=True, slots=True)
class ChatStyle:
    """How a chat template is to write a conversation."""

    begins_answer: bool = True
    """End where the assistant's answer begins."""
    continues_last: bool = False
    """End in the middle of the last message, which the answer goes on with; not with `begins_answer`."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the template is told beside the messages."""


PLAIN_CHAT = ChatStyle()


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model directory, without any network. Raises SetupError if there is none."""
    try:
        tokenizer: Any = _tokenizer_class(model_dir).from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SetupError(f"{model_dir} has no tokenizer that can be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise SetupError(f"{model_dir} has no fast tokenizer (tokenizer.json)")
    return tokenizer  # type: ignore[no-any-return]


def _tokenizer_class(model_dir: Path) -> Any:
    """The class that reads tokenizer.json as it stands, where the model asks for it; else whatever transformers finds.

    To look for a class, transformers imports torch and most of itself: two seconds and 250 MB that a DB node can do without.
    Of Llamas it is known that the class they name is the one it finds.
    """
    declared = _facts(model_dir / "tokenizer_config.json")
    if (
        declared.get("tokenizer_class") == "PreTrainedTokenizerFast"
        and "auto_map" not in declared
        and _facts(model_dir / "config.json").get("model_type") == "llama"
    ):
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _facts(file: Path) -> dict[str, Any]:
    """A JSON object; nothing if there is no such file."""
    try:
        return dict(json.loads(file.read_bytes()))
    except FileNotFoundError:
        return {}


def encode(tokenizer: PreTrainedTokenizerFast, text: str, *, special: bool = True) -> list[int]:
    """Tokens of `text`; `special` adds what the model's tokenizer puts around a text."""
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=special).ids)


def decode(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
    """Text of `token_ids`; undecodable bytes become U+FFFD."""
    return str(tokenizer.backend_tokenizer.decode(list(token_ids), skip_special_tokens=skip_special))


def render_chat(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Any]) -> list[int]:
    """Tokens of a conversation by the model's chat template, ready for the assistant's answer.

    Raises InvalidRequest that names the field.
    """
    return encode(tokenizer, chat_text(tokenizer, messages), special=False)


def chat_text(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Any],
    tools: Sequence[Mapping[str, Any]] = (),
    style: ChatStyle = PLAIN_CHAT,
) -> str:
    """A conversation as the model's chat template writes it, with what may be called. Raises InvalidRequest that names the field.

    A template that knows no tools is given them in words.
    """
    import jinja2

    plain = plain_messages(messages)
    template = tokenizer.chat_template
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
    _check_variables(tokenizer, _template_text(template), style.variables)
    if style.continues_last and (plain[-1]["role"] != "assistant" or "tool_calls" in plain[-1]):
        raise InvalidRequest(
            "continue_final_message: the last message must be text of the assistant", param="continue_final_message"
        )
    try:
        return _written(tokenizer, plain, tools, style)
    except RecursionError:
        raise InvalidRequest("messages: they, or tools, are nested too deeply", param="messages") from None
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise _misfit(style, error) from error


def _misfit(style: ChatStyle, error: Exception) -> InvalidRequest:
    """Templates fail in any way on what they do not expect."""
    if style.continues_last:
        name, why = "continue_final_message", "it does not write the last message as it is"
    else:
        name, why = "chat_template_kwargs" if style.variables else "messages", str(error)[:_REASON_CHARS_MAX]
    return InvalidRequest(f"{name} do not fit the model's chat template: {why}", param=name)


def _written(
    tokenizer: PreTrainedTokenizerFast,
    plain: list[dict[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    style: ChatStyle,
) -> str:
    template = _template_text(tokenizer.chat_template or "")
    has_calls = bool(tools) or any(message["role"] == "tool" or "tool_calls" in message for message in plain)
    if has_calls and "tool" not in template:
        plain, tools = in_words(plain, tools), ()
    told: dict[str, Any] = dict(style.variables) | ({"tools": list(tools)} if tools else {})
    if style.continues_last:
        told["continue_final_message"] = True
    return str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=style.begins_answer, **told))


def _check_variables(tokenizer: PreTrainedTokenizerFast, template: str, variables: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for one that the template does not use, or that is not the caller's to set."""
    if not variables:
        return
    not_theirs = {"messages", "conversations", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in variables:
        if name in not_theirs or name not in re.findall(r"[A-Za-z_]\w*", template):
            place = f"chat_template_kwargs.{name[:64]}"
            raise InvalidRequest(f"{place}: the model's chat template has nothing of this name to set", param=place)


def _template_text(template: str | dict[str, str]) -> str:
    return template if isinstance(template, str) else "".join(template.values())


class Detokenizer:
    """The text of one growing answer, up to the first of its stop strings (the one whose end comes first).

    What has been pushed out is final: a character whose bytes are incomplete, and text that may be the beginning of a stop
    string, wait for the tokens that decide. All pushes and `finish` together are the decoded tokens, cut before the stop
    string, however the tokens were split among pushes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop: Sequence[str] = (),
        *,
        skip_special: bool = True,
        min_tokens: int = 0,
        shows_stop: bool = False,
    ) -> None:
        """A stop string that ends within the first `min_tokens` tokens is passed over; with `shows_stop` the one found is shown."""
        assert all(stop), "an empty stop string would stop everything"
        self._backend = tokenizer.backend_tokenizer
        self._skipped = _special_ids(tokenizer) if skip_special else frozenset[int]()
        self._stop = tuple(stop)
        self._num_free = min_tokens
        """Tokens still to come in which no stop string may end."""
        self._shows_stop = shows_stop
        self._context: list[int] = []
        """Tokens shown already, decoded along: some tokenizers write a token's space only after another one."""
        self._context_chars = 0
        self._pending: list[int] = []
        """Tokens after `_context` whose text is not known yet."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; the text that may be shown now."""
        if not self._num_free:
            return self._push(token_ids)
        new = list(token_ids)
        free, rest = new[: self._num_free], new[self._num_free :]
        text = self._push(free)
        self._num_free -= len(free)
        return text + self._push(rest) if rest else text

    def _push(self, token_ids: Iterable[int]) -> str:
        if self.stopped:
            return ""
        known = self._backend.id_to_token  # models pad their vocabulary with ids that are no token
        self._pending += [token for token in token_ids if token not in self._skipped and known(token) is not None]
        return self._show(self._decided_text()) if self._pending else ""

    def finish(self) -> str:
        """No more tokens come: the rest of the text."""
        if self.stopped:
            return ""
        text = self._show(self._decode(self._context + self._pending)[self._context_chars :])
        self._pending = []
        rest, self._held = self._held, ""
        return text + rest

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=False)

    def _decided_text(self) -> str:
        """Text of the pending tokens that later tokens cannot change."""
        text = self._decode(self._context + self._pending)
        if len(text) > self._context_chars and not text.endswith(REPLACEMENT):
            return self._advance(len(self._pending), text)
        if len(self._pending) <= PENDING_TOKENS_MAX:
            return ""
        for num_kept in range(1, CHARACTER_BYTES_MAX + 1):
            head = self._context + self._pending[:-num_kept]
            decided = self._decode(head)
            # Equal only if no character reaches over the cut, so what lies before it is final.
            if decided + self._decode(self._pending[-num_kept:]) == text and len(decided) > self._context_chars:
                return self._advance(len(self._pending) - num_kept, decided)
        return ""

    def _advance(self, num_tokens: int, text: str) -> str:
        """Show the first pending tokens, whose text ends `text`; they become the context of those that follow."""
        shown = text[self._context_chars :]
        self._context = self._pending[:num_tokens][-PENDING_TOKENS_MAX:]
        self._context_chars = len(self._decode(self._context))
        self._pending = self._pending[num_tokens:]
        return shown

    def _show(self, text: str) -> str:
        """Cut at a stop string, or hold back what may become one."""
        if not self._stop:
            return text
        seen, text = len(self._held), self._held + text
        ends = [] if self._num_free else _stops_found(text, self._stop, seen)
        if ends:
            self.stopped = True
            self._held = ""
            end, start = min(ends)
            return text[: end if self._shows_stop else start]
        num_held = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def _stops_found(text: str, stops: Sequence[str], seen: int) -> list[tuple[int, int]]:
    """End and start of the first of each stop string that ends behind the characters seen before."""
    starts = ((stop, text.find(stop, max(0, seen - len(stop) + 1))) for stop in stops)
    return [(start + len(stop), start) for stop, start in starts if start >= 0]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, without being all of it."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


@functools.lru_cache(maxsize=4)
def _special_ids(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)
