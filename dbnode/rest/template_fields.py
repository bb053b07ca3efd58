"""The fields that say how the model's chat template writes the messages. Protocol code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dbnode.rest.fields import Boolean, Field, Schema
from stratakv.errors import InvalidRequest
from stratakv.text import PLAIN_CHAT, ChatStyle

VARIABLES_MAX = 32


class Variables:
    """What the template is told beside the messages; `stratakv.text` knows which names it uses."""

    schema: Schema = {"type": "object", "maxProperties": VARIABLES_MAX}  # noqa: RUF012

    def read(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > VARIABLES_MAX:
            raise InvalidRequest(f"{name}: expected an object of at most {VARIABLES_MAX} variables", param=name)
        return value


TEMPLATE: dict[str, Field] = {
    "chat_template_kwargs": Variables(),
    "add_generation_prompt": Boolean(),
    "continue_final_message": Boolean(),
}


def chat_style(given: Mapping[str, Any]) -> ChatStyle:
    """What these fields ask for together. Raises InvalidRequest."""
    if not given.keys() & TEMPLATE:
        return PLAIN_CHAT
    continues_last = given.get("continue_final_message", False)
    begins_answer = given.get("add_generation_prompt", not continues_last)
    if continues_last and begins_answer:
        raise InvalidRequest(
            "continue_final_message: only with add_generation_prompt = false", param="continue_final_message"
        )
    return ChatStyle(begins_answer, continues_last, given.get("chat_template_kwargs", {}))
