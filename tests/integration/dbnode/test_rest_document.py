"""The OpenAPI document is true: schemathesis tries everything that it says, and finds nothing else."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from dbnode.rest.openapi import OPERATIONS
from stratakv import migrate
from stratakv.settings import RestSettings, Secret
from stratakv.text import encode
from tests.integration.dbnode.running_node import PoolOfBlocks, RunningNode, running_node
from tests.stand_in_worker import StandInWorker

KEY = "key-1"
EXAMPLES = 25
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,"
    "response_headers_conformance,negative_data_rejection,unsupported_method,ignored_auth"
)
SEED = 4


async def schemathesis(node: RunningNode, directory: Path, *flags: str) -> tuple[int, str]:
    """Its status and what it says; it remembers failures in the directory."""
    command = (
        "-m",
        "schemathesis.cli",
        "run",
        f"{node.url}/openapi.json",
        "-H",
        f"Authorization: Bearer {KEY}",
        *flags,
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, cwd=directory, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return process.returncode, output.decode()


@pytest.mark.timeout(180)
async def test_no_request_finds_a_fault_or_an_answer_that_is_not_documented(postgres_url: str, tmp_path: Path) -> None:
    await asyncio.to_thread(migrate.upgrade, postgres_url)
    worker = await StandInWorker("w0").start()
    try:
        async with running_node(
            worker, meta=PoolOfBlocks(1), rest=RestSettings(api_key=Secret(KEY)), database_url=postgres_url
        ) as node:
            worker.answer = encode(node.node.inference.tokens.tokenizer, '{"name": "x", "arguments": {}} and more')
            worker.finish_reason = "stop"
            status, output = await schemathesis(
                node,
                tmp_path,
                "--checks",
                CHECKS,
                "--phases",
                "coverage,fuzzing",
                "-n",
                str(EXAMPLES),
                "--seed",
                str(SEED),
                "--warnings",
                "off",
            )
    finally:
        await worker.stop()
    assert status == 0, output


async def test_every_endpoint_is_in_the_document_with_its_body_and_errors() -> None:
    async with running_node() as node, node.http.get("/openapi.json") as response:
        document: Any = await response.json()
    described = {(method, path) for path, item in document["paths"].items() for method in item}
    assert described >= set(OPERATIONS)
    for path, item in document["paths"].items():
        for method, operation in item.items():
            assert "422" not in operation["responses"], path
            if path != "/health":
                assert operation["responses"].keys() >= {"401", "403", "500"}, path
            if (method, path) in OPERATIONS and OPERATIONS[method, path].body is not None:
                assert "requestBody" in operation, path
