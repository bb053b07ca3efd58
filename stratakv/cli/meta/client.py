"""How `stratakv meta` asks: the KVCM API's admin port over HTTP, as JSON; of several meta servers the one that leads."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from stratakv.cli.options import running_settings
from stratakv.errors import SetupError, StrataError, Unavailable
from stratakv.process import reachable_host
from stratakv.settings import MetaSettings

TIMEOUT_S = 30.0
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        help="A meta server's admin port (HTTP); by default the leader's, by the settings.",
    ),
]
Fields = dict[str, Any]


class CallFailed(StrataError):
    """The meta server answered with an error."""

    code = "request_failed"


class AdminClient:
    """Asks one meta server after the other until one does not say that another leads."""

    def __init__(self, settings: MetaSettings, server: str | None = None) -> None:
        """Raises SetupError."""
        self._servers = [_address(server)] if server else list(_servers(settings))
        self._tls = tls_context(settings)
        self._headers = {"content-type": "application/json", **_authorization(settings)}

    def call(self, name: str, /, **fields: Any) -> Fields:
        """The response without its header. Raises CallFailed, Unavailable."""
        refusal: StrataError | None = None
        for host, port in self._servers:
            try:
                answer = self._post(host, port, name, fields)
            except Unavailable as error:
                refusal = refusal or error
                continue
            status = answer.pop("header")["status"]
            if status["code"] == "OK":
                return answer
            refusal = CallFailed(f"{status['code']}: {status['message']}")
            if status["code"] != "SERVER_NOT_LEADER":
                raise refusal
        assert refusal is not None, "at least one server is asked"
        raise refusal

    def _post(self, host: str, port: int, name: str, fields: Fields) -> Fields:
        connection = (
            http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=self._tls)
            if self._tls is not None
            else http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        )
        try:
            connection.request("POST", f"/api/{name}", json.dumps(fields), self._headers)
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Unavailable(
                f"no meta server answers at {host}:{port}: {error}",
                hint="Its KVCM API must be enabled (meta.kvcm_enabled); meta.admin_http_port is its port.",
            ) from None
        finally:
            connection.close()
        if response.status == http.client.UNAUTHORIZED:
            raise CallFailed(
                "the meta server asks who you are, or does not know you",
                hint="Set meta.kvcm_token, or meta.kvcm_user and meta.kvcm_password.",
            )
        if response.status != http.client.OK:
            raise CallFailed(f"the meta server says {response.status}: {body.decode(errors='replace').strip()}")
        answer: Fields = json.loads(body)
        return answer


def admin_client(server: str | None, config: Any, sets: list[str] | None, state_file: Any) -> AdminClient:
    """Of the running meta servers. Raises SetupError."""
    return AdminClient(running_settings(config, sets, state_file).meta, server)


def tls_context(settings: MetaSettings) -> ssl.SSLContext | None:
    """None: the settings know of no certificate. Raises SetupError."""
    if settings.kvcm_tls_cert is None and settings.kvcm_tls_ca is None:
        return None
    roots = settings.kvcm_tls_ca or settings.kvcm_tls_cert
    try:
        return ssl.create_default_context(cafile=roots)
    except (OSError, ssl.SSLError) as error:
        raise SetupError(f"{roots}: cannot be read as certificates: {error}") from None


def _authorization(settings: MetaSettings) -> dict[str, str]:
    if settings.kvcm_user:
        pair = f"{settings.kvcm_user}:{settings.kvcm_password or ''}".encode()
        return {"authorization": f"Basic {base64.b64encode(pair).decode()}"}
    return {"authorization": f"Bearer {settings.kvcm_token}"} if settings.kvcm_token else {}


def _servers(settings: MetaSettings) -> Iterator[tuple[str, int]]:
    first = reachable_host(settings.kvcm_host)
    yield first, settings.admin_http_port
    for address in settings.addresses:
        host = address.rpartition(":")[0].strip("[]")
        if host != first:
            yield host, settings.admin_http_port


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise SetupError(f"--server {text}: expected HOST:PORT")
    return host.strip("[]"), int(port)
