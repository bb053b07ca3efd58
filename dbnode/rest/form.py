"""The two kinds of answers to generated text."""

from __future__ import annotations

import enum


class Form(enum.Enum):
    """Which endpoint's objects an answer is made of."""

    CHAT = "chat.completion"
    COMPLETION = "text_completion"

    @property
    def id_prefix(self) -> str:
        return "chatcmpl-" if self is Form.CHAT else "cmpl-"
