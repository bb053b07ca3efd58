"""Errors of conversations.

InvalidRequest
├── ConversationNotFound    there is none of this id, or it is another tenant's
├── ConversationChanged     it is no longer as the caller knows it
└── ConversationFull        it would be longer than it may be
StrataError
└── ConversationBusy        another turn is under way
Overloaded
└── TooManyConversations    the tenant has as many as it may
"""

from __future__ import annotations

from stratakv.errors import InvalidRequest, Overloaded, StrataError


class ConversationNotFound(InvalidRequest):
    """There is none, or none that this caller may see: nobody is told which."""

    code = "conversation_not_found"
    http_status = 404
    sqlstate = "42704"


class ConversationChanged(InvalidRequest):
    """Somebody else has changed it since the caller has read it."""

    openai_type = "conflict_error"
    code = "conversation_changed"
    http_status = 409
    sqlstate = "40001"


class ConversationFull(InvalidRequest):
    """A limit of its length; a new one, or a fork at an earlier item, has room."""

    code = "conversation_full"
    sqlstate = "54000"


class ConversationBusy(StrataError):
    """One turn at a time."""

    openai_type = "conflict_error"
    code = "conversation_busy"
    http_status = 409
    sqlstate = "55006"
    retryable = True


class TooManyConversations(Overloaded):
    """Conversations of one tenant."""

    code = "too_many_conversations"
