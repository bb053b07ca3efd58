"""The bytes of single tokens, which need not be whole characters. Used where answers tell of their tokens one by one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Of one tokenizer. May be shared by threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._added = {token_id: token.content for token_id, token in self._backend.get_added_tokens_decoder().items()}
        self._byte_of = _byte_alphabet() if "ByteLevel" in repr(self._backend.decoder) else {}

    def bytes_of(self, token_id: int) -> bytes:
        """What the token adds to a text; empty for an id that is no token."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_of and all(character in self._byte_of for character in token):
            return bytes(self._byte_of[character] for character in token)
        if match := _BYTE.fullmatch(token):
            return bytes([int(match[1], 16)])
        # Some decoders take the space from the beginning of a text, so the token is not decoded alone.
        return token.replace("▁", " ").encode()

    def text_of(self, token_id: int) -> str:
        """The same as text; bytes that are no characters become U+FFFD."""
        return self.bytes_of(token_id).decode(errors="replace")


def _byte_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write each byte as: printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
