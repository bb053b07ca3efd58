"""The OpenAPI document of the REST face: every endpoint, what its body may be, and every status that can come.

Bodies are told from the tables of fields that check them (`dbnode.rest.parse`). Called by `dbnode.rest.app`; endpoints that
are not listed here appear as FastAPI describes them, with the errors that any endpoint can have.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from dbnode.rest.answer_schemas import SCHEMAS, Schema, named
from dbnode.rest.conversation_document import CONVERSATION_OPERATIONS, CONVERSATION_SCHEMAS
from dbnode.rest.door import OPEN_PATHS
from dbnode.rest.fields import object_schema
from dbnode.rest.operation import GENERATED, WITH_BODY, Operation
from dbnode.rest.parse import CHAT, COMPLETION, DROP, PIN
from dbnode.rest.tokens import DETOKENIZE, TOKENIZE

_ERRORS = {
    400: "The body is malformed, or a field or value is not supported; `param` names it.",
    401: "The API key is missing or wrong.",
    403: "The key does not allow this.",
    404: "This is not here.",
    408: "The body did not arrive in time.",
    409: "It is in use, or not as the request expects it.",
    413: "The body is too long.",
    429: "Too much is in progress or waiting; see Retry-After.",
    500: "A fault of ours.",
    502: "Workers went away, or failed, with the request in hand.",
    503: "No worker is there, or a part that is needed does not answer; see Retry-After.",
    504: "The request's deadline passed.",
}
_ALWAYS = (401, 403, 429, 500, 503)
_METHODS = ("get", "post", "put", "patch", "delete")


OPERATIONS: dict[tuple[str, str], Operation] = {
    ("post", "/v1/chat/completions"): Operation(
        "The model's answer to messages",
        "ChatCompletion",
        object_schema(CHAT, ("messages",)),
        event="ChatCompletionEvent",
        errors=GENERATED,
    ),
    ("post", "/v1/completions"): Operation(
        "What the model goes on with after a prompt",
        "Completion",
        object_schema(COMPLETION, ("prompt",)),
        event="CompletionEvent",
        errors=GENERATED,
    ),
    ("post", "/v1/embeddings"): Operation("Not offered", "Error", errors=(404,)),
    ("get", "/v1/models"): Operation("The model served", "Models"),
    ("get", "/v1/models/{model}"): Operation("One model", "Model", errors=(404,)),
    ("post", "/tokenize"): Operation(
        "Tokens of a text or of messages", "Tokens", object_schema(TOKENIZE), errors=WITH_BODY
    ),
    ("post", "/detokenize"): Operation(
        "The text of tokens", "DetokenizedText", object_schema(DETOKENIZE, ("tokens",)), errors=WITH_BODY
    ),
    ("post", "/v1/stratakv/pin"): Operation(
        "Keep a prompt in the pool", "Pinned", object_schema(PIN, ("seconds",)), errors=WITH_BODY
    ),
    ("get", "/health"): Operation("Whether the process lives", "Alive"),
    ("get", "/ready"): Operation("Whether requests can be served", "Ready", more={503: "Ready"}),
    ("get", "/version"): Operation("The version", "Version"),
    ("get", "/metrics"): Operation("Prometheus metrics", "", media_type="text/plain"),
    ("post", "/admin/cache/drop"): Operation(
        "Make workers forget", "Object", object_schema(DROP), body_is_optional=True, errors=WITH_BODY
    ),
    ("get", "/admin/routes"): Operation("The last routing decisions", "Object"),
    ("get", "/admin/workers"): Operation("The workers that are known", "Object"),
    **CONVERSATION_OPERATIONS,
}


def document_of(app: FastAPI) -> Callable[[], Schema]:
    """What `app.openapi` is to be; the document is made when it is first asked for."""
    made: Schema = {}

    def document() -> Schema:
        if not made:
            made.update(_document(app))
        return made

    return document


def _document(app: FastAPI) -> Schema:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = document.setdefault("components", {})
    found = {name: schema for name, schema in components.get("schemas", {}).items() if "ValidationError" not in name}
    components["schemas"] = found | SCHEMAS | CONVERSATION_SCHEMAS
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"key": []}]
    paths = {path.replace(":path}", "}"): item for path, item in document.get("paths", {}).items()}
    for method, path in OPERATIONS:
        paths.setdefault(path, {}).setdefault(method, {})
    for path, item in paths.items():
        for method in item.keys() & set(_METHODS):
            item[method] = _operation(method, path, item[method])
    return document | {"paths": dict(sorted(paths.items()))}


def _operation(method: str, path: str, described: Schema) -> Schema:
    """One endpoint: what is said here goes before what FastAPI found out."""
    operation = OPERATIONS.get((method, path))
    responses = {status: answer for status, answer in described.get("responses", {}).items() if status != "422"}
    if operation is None:
        errors = (*_ALWAYS, *(WITH_BODY if method != "get" else (404,)))
        return described | {"responses": responses | _errors(errors)}
    responses = _errors(() if path in OPEN_PATHS else (*_ALWAYS, *operation.errors))
    if operation.answer != "Error":
        responses["200"] = _answers(operation)
    for status, name in operation.more.items():
        either = {"anyOf": [named(name), named("Error")]}
        responses[str(status)] = {"description": _ERRORS[status], "content": _content("application/json", either)}
    told = {"summary": operation.summary, "operationId": f"{method}_{path.strip('/').replace('/', '_')}"}
    parameters = [*described.get("parameters", ()), *operation.parameters]
    kept: Schema = {"parameters": parameters} if parameters else {}
    if operation.body is not None:
        body = {"content": _content("application/json", operation.body), "required": not operation.body_is_optional}
        kept["requestBody"] = body
    security: Schema = {"security": []} if path in OPEN_PATHS else {}
    return told | kept | {"responses": dict(sorted(responses.items()))} | security


def _answers(operation: Operation) -> Schema:
    schema = named(operation.answer) if operation.answer else {"type": "string"}
    content = _content(operation.media_type, schema)
    if operation.event is not None:
        content |= _content("text/event-stream", _event(operation.event))
    return {"description": operation.summary, "content": content}


def _event(name: str) -> Schema:
    """One server-sent event; the last one is no JSON."""
    said = {"anyOf": [named(name), named("Error")]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": said}
    properties = {"data": {"anyOf": [{"const": "[DONE]"}, data]}}
    return {"type": "object", "properties": properties, "required": ["data"]}


def _errors(statuses: tuple[int, ...]) -> Schema:
    return {
        str(status): {"description": _ERRORS[status], "content": _content("application/json", named("Error"))}
        for status in statuses
    }


def _content(media_type: str, schema: Schema) -> Schema:
    return {media_type: {"schema": schema}}
