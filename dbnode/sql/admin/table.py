"""What a SHOW command answers with: columns of text and whole numbers, as the protocol carries them."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from dbnode.sql.messages import cstring, int16, int32, message

Value = str | int | None
_INT8 = struct.Struct("!q")
_ATTRIBUTE = struct.Struct("!ihihih")


class Type(enum.Enum):
    """PostgreSQL's type of a column: its oid and length."""

    TEXT = (25, -1)
    INT8 = (20, 8)


@dataclass(frozen=True, slots=True)
class Column:
    """Name and type."""

    name: str
    type: Type


@dataclass(frozen=True, slots=True)
class Table:
    """Rows as wide as `columns`."""

    columns: tuple[Column, ...]
    rows: list[tuple[Value, ...]]

    def description(self, formats: tuple[int, ...]) -> bytes:
        """RowDescription."""
        parts = [int16(len(self.columns))]
        for column, code in zip(self.columns, self._formats(formats), strict=True):
            oid, length = column.type.value
            parts += [cstring(column.name), _ATTRIBUTE.pack(0, 0, oid, length, -1, code)]
        return message(b"T", b"".join(parts))

    def data(self, formats: tuple[int, ...]) -> bytes:
        """A DataRow for each row."""
        codes = self._formats(formats)
        return b"".join(message(b"D", int16(len(row)) + b"".join(map(_field, row, codes))) for row in self.rows)

    def _formats(self, formats: tuple[int, ...]) -> tuple[int, ...]:
        """As in Bind: none for all text, one for all, or one for each."""
        if len(formats) == len(self.columns):
            return formats
        return (formats[0] if formats else 0,) * len(self.columns)


def columns(text: str) -> tuple[Column, ...]:
    """Names by which columns are declared; `name#` is a whole number."""
    return tuple(Column(name.rstrip("#"), Type.INT8 if name.endswith("#") else Type.TEXT) for name in text.split())


def _field(value: Value, code: int) -> bytes:
    if value is None:
        return int32(-1)
    encoded = _INT8.pack(value) if code and isinstance(value, int) else str(value).replace("\0", "").encode()
    return int32(len(encoded)) + encoded
