"""`stratakv meta` against a meta server: what it lists and changes, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stratakv.cli import app
from tests.certificates import write_certificate
from tests.integration.meta_server.kvcm.test_meta_service import start
from tests.kvcm_clients import GrpcClient, KvcmProcess, running

INSTANCE = {
    "instance_id": "m",
    "instance_group": "default",
    "block_size": 4,
    "location_spec_infos": [{"name": "tp0", "size": 64}],
}


class CommandLine:
    """Runs commands of `stratakv meta` with these settings."""

    def __init__(self, **settings: object) -> None:
        self.env = {f"STRATAKV_META_{name.upper()}": str(value) for name, value in settings.items()}

    def text(self, *words: str, status: int = 0, said: str | None = None) -> str:
        done = CliRunner(env=self.env).invoke(app, ["meta", *words], input=said)
        assert done.exit_code == status, (done.output, done.exception)
        return done.output

    def json(self, *words: str, said: str | None = None) -> Any:
        return json.loads(self.text(*words, "--json", said=said))


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    files = write_certificate(tmp_path_factory.mktemp("tls"), "meta")
    return {"kvcm_tls_cert": files.certificate, "kvcm_tls_key": files.key}


@pytest.fixture
def server(migrated_url: str, tmp_path: Path, tls: dict[str, object]) -> Iterator[KvcmProcess]:
    with running(KvcmProcess(migrated_url, tmp_path, kvcm_token="a-token", **tls)) as process:
        yield process


async def test_everything_can_be_listed_and_changed(
    server: KvcmProcess, tls: dict[str, object], tmp_path: Path
) -> None:
    port = {"admin_http_port": server.ports.of("admin", "http")}
    root = {"kvcm_tls_ca": tls["kvcm_tls_cert"]}
    meta = CommandLine(**port, **root, kvcm_token="a-token")
    client = GrpcClient(server.ports, "a-token", root=tls["kvcm_tls_cert"])  # type: ignore[arg-type]
    await client.ok("RegisterInstance", **INSTANCE)
    opened = await start(client, "m", [1, 2])

    (session,) = meta.json("sessions", "--instance", "m")["sessions"]
    assert session["write_session_id"] == opened["write_session_id"]
    assert (session["block_count"], session["size_bytes"]) == ("2", "128")
    assert opened["write_session_id"] in meta.text("sessions")

    assert [one["instance_id"] for one in meta.json("instances")] == ["m"]
    assert meta.json("instances", "show", "m")["block_size"] == 4
    (default,) = meta.json("groups")
    assert (default["used_bytes"], default["key_count"], default["instance_count"]) == ("128", "2", "1")

    directory = tmp_path / "more"
    directory.mkdir()
    meta.json("storages", "add", "more", str(directory), "--kind", "3fs")
    meta.json("storages", "disable", "more")
    states = {one["storage"]["global_unique_name"]: one for one in meta.json("storages")}
    assert (states["more"]["is_enabled"], states["nfs_01"]["is_enabled"]) == (False, True)
    assert (states["nfs_01"]["used_bytes"], states["nfs_01"]["key_count"]) == ("128", "2")
    meta.json("storages", "enable", "more")
    assert str(directory) in meta.text("storages")

    meta.json("groups", "create", "g", "--storage", "more", "--capacity", "1GiB", "--level", "0.5")
    meta.json("groups", "set", "g", "--max-keys", "1000")
    group = meta.json("groups", "show", "g")
    assert (group["version"], group["quota"]["capacity"]) == ("2", str(1024**3))
    assert group["cache_config"]["meta_indexer_config"]["max_key_count"] == "1000"
    meta.json("groups", "remove", "g")
    meta.json("storages", "remove", "more")
    meta.json("instances", "remove", "m")
    assert meta.json("instances") == []
    assert meta.json("sessions")["sessions"] == []

    meta.json("accounts", "add", "operator", "--role", "admin", said="a long password\n")
    by_name = CommandLine(**port, **root, kvcm_user="operator", kvcm_password="a long password")
    assert by_name.json("accounts") == [{"user_name": "operator", "role": "ROLE_ADMIN"}]
    meta.json("accounts", "remove", "operator")
    by_name.text("accounts", status=1)
    CommandLine(**port, kvcm_token="a-token").text("accounts", status=1)

    assert meta.json("leader")["is_leader"] is True
    meta.json("leader", "delay", "0.2")
    assert meta.json("leader")["campaign_delay_time_ms"] == "200"
    meta.json("leader", "demote")


def test_who_does_not_answer_is_named() -> None:
    assert CommandLine().text("groups", "--server", "127.0.0.1:1", status=1) == ""
