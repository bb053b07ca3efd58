"""Who is let in: accounts with passwords, what each role may call, TLS, and no listener beyond this machine without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import aiohttp
import grpc
import psycopg
import pytest

from tests.certificates import write_certificate
from tests.kvcm_clients import TRANSPORTS, Client, GrpcClient, HttpClient, KvcmProcess, running

OPERATOR = ("operator", "a long password")
ENGINE = ("engine", "another password")


async def refusal(client: Client, name: str, service: str, **fields: Any) -> str:
    """How a transport says that it does not let a caller in."""
    if isinstance(client, HttpClient):
        with pytest.raises(AssertionError):
            await client.call(name, service, **fields)
        url = f"http://127.0.0.1:{client.ports.of(service, 'http')}/api/{name[0].lower()}{name[1:]}"
        async with aiohttp.ClientSession() as session, session.post(url, headers=client.headers) as response:
            return {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}[response.status]
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.call(name, service, **fields)
    return str(refused.value.code().name)


async def test_accounts_let_in_by_role_over_both_transports_and_outlive_a_kill(
    migrated_url: str, tmp_path: Path
) -> None:
    with running(KvcmProcess(migrated_url, tmp_path)) as server:
        anybody = GrpcClient(server.ports)
        user = {"user_name": ENGINE[0], "password": ENGINE[1]}
        first = {"user_name": OPERATOR[0], "password": OPERATOR[1], "role": "ROLE_ADMIN"}
        assert await anybody.code("AddAccount", "admin", **user) == "INVALID_ARGUMENT"
        assert await anybody.code("AddAccount", "admin", **first | {"password": "short"}) == "INVALID_ARGUMENT"
        await anybody.ok("AddAccount", "admin", **first)
        operator = HttpClient(server.ports, login=OPERATOR)
        await operator.ok("AddAccount", "admin", **first)
        await operator.ok("AddAccount", "admin", **user)
        assert await operator.code("AddAccount", "admin", **user | {"password": "not the same"}) == "DUPLICATE_ENTITY"
        assert await operator.code("DeleteAccount", "admin", user_name=OPERATOR[0]) == "INVALID_ARGUMENT"
        for _ in range(2):
            for transport in TRANSPORTS.values():
                asked = {"instance_id": "nobody"}
                known = transport(server.ports, login=ENGINE)
                assert await known.code("GetInstanceInfo", **asked) == "INSTANCE_NOT_EXIST"
                assert await refusal(known, "ListStorage", "admin") == "PERMISSION_DENIED"
                for wrong in ((ENGINE[0], "not the same"), ("somebody", ENGINE[1])):
                    stranger = transport(server.ports, login=wrong)
                    assert await refusal(stranger, "GetInstanceInfo", "meta", **asked) == "UNAUTHENTICATED"
                assert await refusal(transport(server.ports), "GetInstanceInfo", "meta") == "UNAUTHENTICATED"
            server.kill()
            server.start()
        listed = (await operator.ok("ListAccount", "admin"))["accounts"]
        assert listed == [
            {"user_name": "engine", "role": "ROLE_USER"},
            {"user_name": "operator", "role": "ROLE_ADMIN"},
        ]
        await operator.ok("DeleteAccount", "admin", user_name=ENGINE[0])
        assert await refusal(GrpcClient(server.ports, login=ENGINE), "GetInstanceInfo", "meta") == "UNAUTHENTICATED"
        with psycopg.connect(migrated_url) as connection:
            kept = connection.execute("SELECT * FROM stratakv.kvcm_accounts").fetchall()
        assert [row[0] for row in kept] == ["operator"]
        assert OPERATOR[1] not in str(kept) + server.log()


async def test_with_a_certificate_both_transports_speak_tls_only(migrated_url: str, tmp_path: Path) -> None:
    files = write_certificate(tmp_path, "meta")
    settings = {"kvcm_tls_cert": files.certificate, "kvcm_tls_key": files.key, "kvcm_token": "a-token"}
    with running(KvcmProcess(migrated_url, tmp_path, kvcm_host="0.0.0.0", **settings)) as server:
        for transport in TRANSPORTS.values():
            client = transport(server.ports, "a-token", root=files.certificate)
            await client.ok("ListStorage", "admin")
            await client.ok(
                "RegisterInstance",
                instance_id="m",
                instance_group="default",
                block_size=4,
                location_spec_infos=[{"name": "tp0", "size": 64}],
            )
        with pytest.raises(aiohttp.ClientError):
            await HttpClient(server.ports, "a-token").call("ListStorage", "admin")


@pytest.mark.parametrize(("settings", "missing"), [({}, "kvcm_token"), ({"kvcm_token": "t"}, "kvcm_tls_cert")])
def test_a_listener_beyond_this_machine_needs_a_token_and_tls(
    migrated_url: str, tmp_path: Path, settings: dict[str, str], missing: str
) -> None:
    status, said = KvcmProcess(migrated_url, tmp_path, kvcm_host="0.0.0.0", **settings).run()
    assert status == 2
    assert f"meta.{missing}" in said


def test_a_key_that_others_may_read_is_refused(migrated_url: str, tmp_path: Path) -> None:
    files = write_certificate(tmp_path, "meta")
    files.key.chmod(0o644)
    server = KvcmProcess(migrated_url, tmp_path, kvcm_tls_cert=files.certificate, kvcm_tls_key=files.key)
    status, said = server.run()
    assert status == 2
    assert f"chmod 600 {files.key}" in said
