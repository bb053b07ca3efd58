"""The command line: one clear message for what an operator can mend, status 2, and never a traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stratakv.cli.sql import _connection
from stratakv.cli.status import Report, _print
from stratakv.config import options
from stratakv.profile_store import ProfileKey, ProfileStore
from stratakv.settings import Secret, Settings, SqlSettings
from stratakv.wire import Stats
from stratakv.worker_profile import DecodePoint, PrefillPoint, WorkerProfile
from tests.support import free_port

TIMEOUT_S = 60


def stratakv(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STRATAKV_")}
    command = [sys.executable, "-m", "stratakv.cli", *arguments]
    return subprocess.run(
        command, env={**inherited, **env}, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


def assert_setup_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_a_taken_port_is_told_with_the_setting_to_change(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = stratakv("up", "--data-dir", str(tmp_path), "--set", f"sql.port={port}")
    assert_setup_error(done, port, "STRATAKV_SQL_PORT", "--ports auto")


def test_an_unreachable_database_is_told_without_its_password() -> None:
    url = f"postgresql://someone:geheim@127.0.0.1:{free_port()}/x"
    done = stratakv("migrate", "upgrade", STRATAKV_DATABASE_URL=url)
    assert_setup_error(done, "cannot connect", "someone")
    assert "geheim" not in done.stdout + done.stderr


def test_an_unmigrated_database_is_told_with_the_command_to_run(postgres_url: str) -> None:
    assert_setup_error(stratakv("migrate", "check", "--database", postgres_url), "stratakv migrate upgrade")


def test_a_database_can_be_migrated_up_and_down_again(postgres_url: str) -> None:
    assert stratakv("migrate", "upgrade", "--database", postgres_url).returncode == 0
    assert stratakv("migrate", "check", "--database", postgres_url).returncode == 0
    shown = json.loads(stratakv("migrate", "current", "--database", postgres_url, "--json").stdout)
    assert shown["current"] == shown["head"]
    assert stratakv("migrate", "downgrade", "base", "--database", postgres_url).returncode == 0
    named = ("--set", f"database.url={postgres_url}")
    assert_setup_error(stratakv("migrate", "check", *named), "revision none")


def test_a_missing_database_is_told() -> None:
    assert_setup_error(stratakv("install"), "--database", "STRATAKV_DATABASE_URL")


def test_an_unknown_model_is_told_with_the_names_that_work(tmp_path: Path) -> None:
    done = stratakv("model", "pull", "nosuch", STRATAKV_MODEL_CACHE_DIR=str(tmp_path))
    assert_setup_error(done, "nosuch", "smollm2-135m", "hf://")


def test_a_worker_without_its_model_tells_how_to_fetch_it(tmp_path: Path) -> None:
    done = stratakv("serve", "worker", "--port", str(free_port()), STRATAKV_MODEL_CACHE_DIR=str(tmp_path))
    assert_setup_error(done, "stratakv model pull smollm2-135m")


@pytest.mark.parametrize("service", ["dbnode", "meta", "dmp", "worker"])
def test_a_service_speaks_by_the_name_it_was_started_with(service: str) -> None:
    assert_setup_error(stratakv("serve", service, STRATAKV_WRONG_KEY="1"), f"stratakv serve {service}: ")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["up", "--ports", "some"], "--ports"),
        (["up", "--no-such-option"], "--no-such-option"),
        (["config", "show", "--set", "worker.rule=x"], "worker.rule"),
        (["config", "show", "--set", "worker.role=chef"], "prefill, decode, both"),
        (["config", "show", "--set", "nonsense"], "SECTION.KEY=VALUE"),
        (["serve", "dmp", "--prot", "1"], "--prot"),
        (["serve", "kitchen"], "kitchen"),
        (["bench", "no-such-bench"], "no-such-bench"),
    ],
)
def test_a_wrong_option_is_named(arguments: list[str], part: str) -> None:
    assert_setup_error(stratakv(*arguments), part)


def test_benchmarks_are_listed_with_what_they_measure_and_without_their_parts() -> None:
    listed = stratakv("bench").stdout.splitlines()
    assert any(line.startswith("chat_warm  ") and "time to first token" in line for line in listed)
    assert [line for line in listed if line.startswith(("harness", "vllm_driver", "rest_worker"))] == []


def test_settings_are_shown_with_secrets_masked() -> None:
    done = stratakv("config", "show", "--json", STRATAKV_REST_API_KEY="geheim", STRATAKV_WORKER_DTYPE="fp32")
    shown = json.loads(done.stdout)
    assert (shown["rest"]["api_key"], shown["worker"]["dtype"], shown["database"]["url"]) == ("***", "fp32", None)
    assert "geheim" not in stratakv("config", "show", STRATAKV_REST_API_KEY="geheim").stdout


def test_no_name_is_cut_in_a_pipe() -> None:
    shown = stratakv("config", "show", COLUMNS="80").stdout
    assert [option.env for option in options() if option.env not in shown] == []
    assert "…" not in shown


def test_status_tells_programs_that_nothing_answers() -> None:
    done = stratakv("status", "--json", "--set", f"rest.port={free_port()}", "--set", f"meta.native_port={free_port()}")
    assert done.returncode == 1
    shown = json.loads(done.stdout)
    assert shown["db_node"]["ready"] == "no answer"
    assert shown["meta_server"].startswith("no answer")


def test_status_counts_one_of_a_thing_and_several(capsys: pytest.CaptureFixture[str]) -> None:
    db_node = {"url": "http://x", "sql": "x:1", "health": "yes", "ready": "yes"}
    _print(Report(db_node, stats=Stats(1, 4096, 0, 0, 1, 1, lookups=2, lookup_hits=1, evictions=0)))
    assert "1 block in the pool, 2 lookups, 1 hit, 0 evictions" in capsys.readouterr().out


def test_chat_without_a_server_ends_with_one_message() -> None:
    done = stratakv("chat", "hello", "--url", f"http://127.0.0.1:{free_port()}")
    assert done.returncode == 1
    assert "no answer from 127.0.0.1" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_sql_prompt_goes_to_the_db_node_with_the_backends_role() -> None:
    settings = Settings(sql=SqlSettings(port=7000, backend_url=Secret("postgresql://ann:p%40ss@db/shop")))
    expected = {"host": "127.0.0.1", "port": "7000", "user": "ann", "dbname": "shop", "password": "p@ss"}
    assert _connection(settings, None, None) == expected
    assert _connection(Settings(), None, None) == {
        "host": "127.0.0.1",
        "port": "6432",
        "user": "postgres",
        "dbname": "stratakv",
    }
    assert "password" not in _connection(settings, "bob", None)


def test_versions_are_told_to_programs() -> None:
    assert json.loads(stratakv("version", "--json").stdout)["protocol"] >= 1


def test_profiles_are_shown_as_a_table_and_as_json(tmp_path: Path) -> None:
    key = ProfileKey("m", "r", "bf16", "a processor", 2, "0.1")
    points = (PrefillPoint(512, 0, 0.25), PrefillPoint(64, 2048, 0.1))
    ProfileStore(tmp_path).keep(key, WorkerProfile(points, (DecodePoint(8, 128, 0.045),), {"l2": 5e9}))
    cache_dir = f"model.cache_dir={tmp_path}"
    shown = stratakv("profile", "--set", cache_dir).stdout
    for part in ("m bf16", "a processor, 2 threads", "64 + 2048: 100 ms", "8 × 128: 45.0 ms", "l2: 5.00 GB/s", "0.0 h"):
        assert part in shown
    (stored,) = json.loads(stratakv("profile", "--json", "--set", cache_dir).stdout)
    assert stored["profile"]["prefill"][0] == {"num_tokens": 512, "num_cached": 0, "seconds": 0.25}
    assert stored["key"]["model"] == "m"
