"""The error tree every package hangs its own errors on.

Each class knows how it is told to an HTTP client (OpenAI's `type` and `code`, the status), to a SQL client (SQLSTATE) and
whether sending the same request again may help. A package adds subclasses in its own `errors.py`.

    StrataError
    ├── InvalidRequest          the caller must change the request
    │   ├── ContextTooLong
    │   ├── ModelNotFound
    │   └── PermissionDenied
    ├── Overloaded              refused before any work was done
    ├── Unavailable             a part that is needed does not answer
    ├── DeadlineExceeded
    ├── Cancelled
    └── SetupError              the operator must change the set-up: configuration, schema, ports, files
"""

from __future__ import annotations

from typing import Any, ClassVar


class StrataError(Exception):
    """Something failed inside StrataKV."""

    openai_type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    http_status: ClassVar[int] = 500
    sqlstate: ClassVar[str] = "XX000"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """`retry_after_s`: when the same request may go well, if that is known."""
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.retry_after_s = retry_after_s

    def openai_body(self) -> dict[str, Any]:
        """The `error` object of an OpenAI-compatible response."""
        text = self.message
        if self.hint:
            text += f" {self.hint}" if text.endswith((".", "?", "!")) else f". {self.hint}"
        return {"message": text, "type": self.openai_type, "param": self.param, "code": self.code}


class InvalidRequest(StrataError):
    """The request is malformed; repeating it will fail again."""

    openai_type = "invalid_request_error"
    code = "invalid_request"
    http_status = 400
    sqlstate = "22023"


class ContextTooLong(InvalidRequest):
    """Prompt and requested output do not fit the model's context."""

    code = "context_length_exceeded"
    sqlstate = "54000"


class ModelNotFound(InvalidRequest):
    """No worker serves the model that was asked for."""

    code = "model_not_found"
    http_status = 404
    sqlstate = "42704"


class PermissionDenied(InvalidRequest):
    """The caller may not do this."""

    openai_type = "permission_error"
    code = "permission_denied"
    http_status = 403
    sqlstate = "42501"


class Overloaded(StrataError):
    """A queue or limit is full; nothing was done."""

    openai_type = "rate_limit_error"
    code = "overloaded"
    http_status = 429
    sqlstate = "53400"
    retryable = True


class Unavailable(StrataError):
    """A part that the request needs does not answer."""

    openai_type = "service_unavailable_error"
    code = "unavailable"
    http_status = 503
    sqlstate = "57P03"
    retryable = True


class DeadlineExceeded(StrataError):
    """The request's deadline passed."""

    openai_type = "timeout_error"
    code = "deadline_exceeded"
    http_status = 504
    sqlstate = "57014"
    retryable = True


class Cancelled(StrataError):
    """The caller gave the request up."""

    code = "cancelled"
    http_status = 499
    sqlstate = "57014"


class SetupError(StrataError):
    """The set-up is wrong; the message says what, where and how to mend it."""

    code = "setup_error"
    sqlstate = "F0000"
