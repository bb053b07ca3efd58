"""The OpenAI-compatible REST face: all routes, put together over one InferenceService."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dbnode.conversations.service import Conversations
from dbnode.errors import NotOffered
from dbnode.inference import InferenceService
from dbnode.rest.bodies import json_bytes
from dbnode.rest.completions import Completions
from dbnode.rest.conversations import ConversationRoutes
from dbnode.rest.door import Door, caller_of
from dbnode.rest.fields import read_fields
from dbnode.rest.http import Guard, error_response
from dbnode.rest.openapi import document_of
from dbnode.rest.parse import DROP
from dbnode.rest.pins import Pins
from dbnode.rest.tokens import TokenEndpoints
from dbnode.scheduler.pool_view import PoolView
from dbnode.tenants.directory import Directory
from dbnode.tenants.quotas import Quotas
from dbnode.worker_base import WorkerDoor
from stratakv.errors import InvalidRequest, ModelNotFound, StrataError
from stratakv.http_body import read_body
from stratakv.settings import RestSettings
from stratakv.version import version

CACHE_DROP_TIMEOUT_S = 10.0
PATH_CHARS_MAX = 200
"""So much of a path that is not known is repeated to the client."""
ALL_TIERS = {"tiers": ["l1", "l2"]}


class Shortcut:
    """Hands the busiest endpoints their requests itself: else each part of an answer would go through every layer of FastAPI."""

    def __init__(self, app: ASGIApp, direct: Mapping[str, ASGIApp]) -> None:
        self._app = app
        self._direct = direct

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        app = self._direct.get(scope["path"], self._app) if is_post else self._app
        await app(scope, receive, send)


class RestFace:
    """Makes the ASGI application."""

    def __init__(
        self,
        settings: RestSettings,
        service: InferenceService,
        client: WorkerDoor,
        registry: CollectorRegistry,
        not_ready: Callable[[], list[str]],
        pool: PoolView,
        directory: Directory,
        quotas: Quotas,
        conversations: Conversations,
    ) -> None:
        self._settings = settings
        self._service = service
        self._client = client
        self._registry = registry
        self._not_ready = not_ready
        self._pins = Pins(settings, service, pool)
        self._door = Door(settings, directory, quotas)
        self._conversations = conversations

    def app(self) -> Guard:
        app = FastAPI(title="StrataKV", version=version())
        completions = Completions(self._settings, self._service)
        direct: dict[str, ASGIApp] = {
            "/v1/chat/completions": completions.chat(),
            "/v1/completions": completions.completion(),
        }
        for path, endpoint in direct.items():
            app.router.routes.append(Route(path, endpoint, methods=["POST"]))
        ConversationRoutes(self._conversations, completions, self._settings.body_bytes_max).add_to(app)
        tokens = TokenEndpoints(self._settings, self._service)
        app.add_api_route("/tokenize", tokens.tokenize, methods=["POST"])
        app.add_api_route("/detokenize", tokens.detokenize, methods=["POST"])
        app.add_api_route("/v1/embeddings", self._embeddings, methods=["POST"])
        app.add_api_route("/v1/models", self._models, methods=["GET"])
        app.add_api_route("/v1/models/{model:path}", self._model, methods=["GET"])
        app.add_api_route("/v1/stratakv/pin", self._pins.pin, methods=["POST"])
        app.add_api_route("/health", self._health, methods=["GET"])
        app.add_api_route("/ready", self._ready, methods=["GET"])
        for path, looked_at in (("/health", self._health), ("/ready", self._ready)):  # as some load balancers do
            app.add_api_route(path, looked_at, methods=["HEAD"], include_in_schema=False)
        app.add_api_route("/version", self._version, methods=["GET"])
        app.add_api_route("/metrics", self._metrics, methods=["GET"])
        app.add_api_route("/admin/cache/drop", self._drop_cache, methods=["POST"])
        app.add_api_route("/admin/routes", self._routes, methods=["GET"])
        app.add_api_route("/admin/workers", self._workers, methods=["GET"])
        app.add_exception_handler(StrataError, _on_error)
        app.add_exception_handler(HTTPException, _on_error)
        app.add_exception_handler(Exception, _on_error)
        app.openapi = document_of(app)  # type: ignore[method-assign]
        return Guard(Shortcut(app, direct), self._door)

    async def _embeddings(self) -> None:
        raise NotOffered("embeddings are not offered: the model served here generates text")

    async def _models(self, request: Request) -> dict[str, Any]:
        models = caller_of(request).models
        is_shown = self._service.max_model_len() and (models is None or self._service.model in models)
        cards = [self._card()] if is_shown else []
        return {"object": "list", "data": cards}

    async def _model(self, request: Request, model: str) -> dict[str, Any]:
        models = caller_of(request).models
        is_hidden = models is not None and model not in models
        if model != self._service.model or is_hidden or not self._service.max_model_len():
            raise ModelNotFound(f"model {model!r} is not served here", param="model")
        return self._card()

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._service.model,
            "object": "model",
            "created": 0,
            "owned_by": "stratakv",
            "max_model_len": self._service.max_model_len(),
        }

    async def _health(self) -> dict[str, str]:
        return {"status": "alive"}

    async def _ready(self) -> Response:
        reasons = self._not_ready()
        body = json_bytes({"ready": not reasons, "reasons": reasons})
        return Response(body, 503 if reasons else 200, media_type="application/json")

    async def _version(self) -> dict[str, str]:
        return {"version": version()}

    async def _metrics(self) -> Response:
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _drop_cache(self, request: Request) -> dict[str, Any]:
        """Make all workers forget the tiers named in the body, and the router what it believes they hold."""
        body = await read_body(request, self._settings.body_bytes_max)
        body = json_bytes(read_fields(body, DROP) or ALL_TIERS) if body else b""
        records = [r for r in self._service.scheduler.directory.records if r.usable]
        answers = await asyncio.gather(
            *(self._client.drop_cache(r.url, body, CACHE_DROP_TIMEOUT_S) for r in records), return_exceptions=True
        )
        dropped: dict[str, Any] = {}
        for record, answer in zip(records, answers, strict=True):
            record.index.clear()
            if isinstance(answer, InvalidRequest) or not isinstance(answer, dict | StrataError):
                raise answer
            name = record.facts.worker if record.facts else record.url
            dropped[name] = {"error": answer.openai_body()} if isinstance(answer, StrataError) else answer
        return {"workers": dropped}

    async def _routes(self) -> Response:
        return Response(json_bytes({"routes": list(self._service.scheduler.decisions)}), media_type="application/json")

    async def _workers(self) -> Response:
        states = [
            {
                "url": r.url,
                "alive": r.alive,
                "info": r.facts,
                "load": r.load,
                "in_hand": len(r.sent),
                "blocks": len(r.index),
                "problem": r.problem,
                "events": r.events,
            }
            for r in self._service.scheduler.directory.records
        ]
        return Response(json_bytes({"workers": states}), media_type="application/json")


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        place = request.url.path[:PATH_CHARS_MAX]
        what = f"there is no {place}" if error.status_code == 404 else f"{request.method} is not offered at {place}"
        error = HTTPException(error.status_code, what, error.headers)
    return error_response(error, request.scope["state"]["trace_id"])
