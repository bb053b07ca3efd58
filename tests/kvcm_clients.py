"""Plain clients of the KVCM API for tests, one per transport: a call's name and fields in, the response as a dict out."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import grpc.aio
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass

from meta_server.kvcm.protocol import (
    admin_service_pb2,
    debug_service_pb2,
    event_service_pb2,
    meta_service_pb2,
    operator_service_pb2,
)
from stratakv.errors import Unavailable
from tests.meta_process import MetaProcess
from tests.support import eventually, free_port

SERVICES = {
    "meta": meta_service_pb2.DESCRIPTOR.services_by_name["MetaService"],
    "admin": admin_service_pb2.DESCRIPTOR.services_by_name["AdminService"],
    "debug": debug_service_pb2.DESCRIPTOR.services_by_name["DebugService"],
    "events": event_service_pb2.DESCRIPTOR.services_by_name["EventService"],
    "operator": operator_service_pb2.DESCRIPTOR.services_by_name["OperatorService"],
}
PORT_NAMES = {"meta": "kvcm", "admin": "admin", "debug": "admin", "operator": "admin", "events": "kvcm"}


@dataclass
class Ports:
    """Of one meta server."""

    numbers: dict[str, int]

    @classmethod
    def free(cls) -> Ports:
        names = [
            f"{name}_{transport}_port" for name in sorted({*PORT_NAMES.values()}) for transport in ("grpc", "http")
        ]
        return cls({name: free_port() for name in names})

    def of(self, service: str, transport: str) -> int:
        return self.numbers[f"{PORT_NAMES[service]}_{transport}_port"]


class Client:
    """Calls by name; subclasses know a transport."""

    def __init__(
        self, ports: Ports, token: str | None = None, *, login: tuple[str, str] | None = None, root: Path | None = None
    ) -> None:
        """`root`: the certificate of a server with TLS."""
        self.ports = ports
        self.root = root
        self.headers = {"authorization": f"Bearer {token}"} if token else {}
        if login is not None:
            self.headers = {"authorization": f"Basic {base64.b64encode(':'.join(login).encode()).decode()}"}

    async def call(self, name: str, service: str = "meta", /, **fields: Any) -> dict[str, Any]:
        """The response, without its header's request id."""
        answer = await self.send(service, name, fields)
        assert answer["header"].pop("request_id")
        return answer

    async def ok(self, name: str, service: str = "meta", /, **fields: Any) -> dict[str, Any]:
        answer = await self.call(name, service, **fields)
        assert answer["header"]["status"]["code"] == "OK", answer
        return answer

    async def code(self, name: str, service: str = "meta", /, **fields: Any) -> str:
        return (await self.call(name, service, **fields))["header"]["status"]["code"]

    async def send(self, service: str, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def events(self) -> AsyncIterator[dict[str, Any]]:
        """The stream of events, each as JSON has it."""
        raise NotImplementedError


class GrpcClient(Client):
    """Over gRPC, with the wire types and nothing else of the server's."""

    def _channel(self, service: str) -> grpc.aio.Channel:
        address = f"127.0.0.1:{self.ports.of(service, 'grpc')}"
        if self.root is None:
            return grpc.aio.insecure_channel(address)
        return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(self.root.read_bytes()))

    async def send(self, service: str, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        method = SERVICES[service].methods_by_name[name]
        request = json_format.ParseDict(fields, GetMessageClass(method.input_type)())
        async with self._channel(service) as channel:
            path = f"/{SERVICES[service].full_name}/{name}"
            answer_type = GetMessageClass(method.output_type)
            call = channel.unary_unary(path, lambda m: m.SerializeToString(), answer_type.FromString)
            answer = await call(request, metadata=tuple(self.headers.items()), timeout=20, wait_for_ready=True)
        return json_format.MessageToDict(
            answer, always_print_fields_with_no_presence=True, preserving_proto_field_name=True
        )

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        async with self._channel("events") as channel:
            call = channel.unary_stream(
                f"/{SERVICES['events'].full_name}/Subscribe",
                lambda m: m.SerializeToString(),
                event_service_pb2.PoolEvent.FromString,
            )
            stream = call(event_service_pb2.SubscribeRequest(), metadata=tuple(self.headers.items()))
            async for event in stream:
                yield json_format.MessageToDict(
                    event, always_print_fields_with_no_presence=True, preserving_proto_field_name=True
                )


class HttpClient(Client):
    """Over HTTP, as JSON."""

    async def send(self, service: str, name: str, fields: dict[str, Any]) -> dict[str, Any]:
        answer = await self.post(service, name, json.dumps(fields).encode())
        return json.loads(answer)

    async def post(self, service: str, name: str, body: bytes) -> bytes:
        scheme = "http" if self.root is None else "https"
        tls = ssl.create_default_context(cafile=self.root) if self.root is not None else True
        url = f"{scheme}://127.0.0.1:{self.ports.of(service, 'http')}/api/{name[0].lower()}{name[1:]}"
        posted = {"data": body, "headers": self.headers, "ssl": tls}
        async with aiohttp.ClientSession() as session, session.post(url, **posted) as response:
            if response.status == 503:
                raise Unavailable(await response.text())
            assert response.status == 200, await response.text()
            return await response.read()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        url = f"http://127.0.0.1:{self.ports.of('events', 'http')}/events"
        async with aiohttp.ClientSession() as session, session.get(url, headers=self.headers) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                yield json.loads(line)


TRANSPORTS = {"grpc": GrpcClient, "http": HttpClient}


class KvcmProcess(MetaProcess):
    """`python -m meta_server` with the KVCM API, its files below `directory`."""

    def __init__(self, url: str, directory: Path, **settings: object) -> None:
        self.ports = Ports.free()
        self.root = directory / "kvcm"
        super().__init__(url, directory, kvcm_enabled="true", kvcm_file_dir=self.root, **self.ports.numbers, **settings)

    def run(self) -> tuple[int, str]:
        """As for any meta server: one that is expected to end by itself."""
        super().start()
        return self.wait(), self.log()

    def launch(self) -> None:
        """Start."""
        super().start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        starts = self.log().count(" ready ") if self.log_file.exists() else 0
        self.launch()
        eventually(lambda: self.log().count(" ready ") > starts, what="the meta server answers")


@contextmanager
def running(process: KvcmProcess) -> Iterator[KvcmProcess]:
    """Started, and killed at the end."""
    process.start()
    try:
        yield process
    finally:
        process.kill()
