"""Structured logs: an event name and fields, as console lines or JSON, on standard error.

Prompts, keys and SQL literals are never logged above DEBUG.
"""

from __future__ import annotations

import json
import logging
import sys
import time

from stratakv.settings import LogFormat, LogSettings

_FIELDS = "stratakv_fields"


class EventLogger:
    """`log.info("put_expired", put=…, blocks=…)`."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, **fields: object) -> None:
        self._logger.debug(event, extra={_FIELDS: fields})

    def info(self, event: str, **fields: object) -> None:
        self._logger.info(event, extra={_FIELDS: fields})

    def warning(self, event: str, **fields: object) -> None:
        self._logger.warning(event, extra={_FIELDS: fields})

    def error(self, event: str, **fields: object) -> None:
        self._logger.error(event, extra={_FIELDS: fields})

    def exception(self, event: str, **fields: object) -> None:
        """An error with the traceback of the exception being handled."""
        self._logger.error(event, exc_info=True, extra={_FIELDS: fields})


class _ConsoleFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, _FIELDS, {})
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock}.{int(record.msecs):03d} {record.levelname.lower():7} {record.name}: {record.getMessage()}"
        text += "".join(f" {name}={value}" for name, value in fields.items())
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, _FIELDS, {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def log_as_guest() -> None:
    """Inside another program: show what StrataKV itself has to say, with its fields, which other formats leave out."""
    ours = logging.getLogger("stratakv")
    if ours.handlers:
        return
    ours.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_ConsoleFormatter())
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)


def configure_logging(settings: LogSettings) -> None:
    """Set up the root logger of this process."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if settings.format is LogFormat.JSON else _ConsoleFormatter())
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    for noisy in ("asyncio", "alembic", "httpx", "uvicorn.access", "aiohttp.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
