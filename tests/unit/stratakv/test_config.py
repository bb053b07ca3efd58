"""Configuration: which source wins, and that no mistake passes silently."""

from __future__ import annotations

from pathlib import Path

import pytest

from stratakv.config import MASK, load_settings, options, parse_flags, parse_value, show_value, value_text
from stratakv.errors import SetupError
from stratakv.settings import Bytes, Secret
from stratakv.wire import WorkerRole


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "stratakv.toml"
    file.write_text("[worker]\nport = 1\nthreads = 2\nblock_size = 32\n")
    settings = load_settings(
        {("worker", "port"): "3"},
        env={"STRATAKV_WORKER_PORT": "2", "STRATAKV_WORKER_THREADS": "4"},
        config_file=file,
    )
    assert (settings.worker.port, settings.worker.threads, settings.worker.block_size) == (3, 4, 32)
    assert settings.worker.dtype == "bf16"


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "stratakv.toml"
    file.write_text('[router]\nworkers = ["http://a", "http://b"]\n')
    assert load_settings(env={"STRATAKV_CONFIG": str(file)}).router.workers == ("http://a", "http://b")


def test_all_mistakes_are_reported_at_once_with_their_sources(tmp_path: Path) -> None:
    file = tmp_path / "stratakv.toml"
    file.write_text("[worker]\nprot = 1\n[nosuch]\nkey = 1\n")
    with pytest.raises(SetupError) as caught:
        load_settings(
            {("worker", "role"): "chef"},
            env={"STRATAKV_SQL_PORT": "many", "STRATAKV_NO_SUCH": "1", "HOME": "/"},
            config_file=file,
        )
    message = caught.value.message
    for part in (
        "worker.prot",
        "nosuch.key",
        "STRATAKV_SQL_PORT",
        "STRATAKV_NO_SUCH",
        "prefill, decode, both",
        str(file),
    ):
        assert part in message
    assert "HOME" not in message


def test_a_file_that_cannot_be_read_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="No such file"):
        load_settings(env={}, config_file=tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Bytes, "512MiB", 512 * 1024**2),
        (Bytes, "2 GiB", 2 * 1024**3),
        (Bytes, 7, 7),
        (bool, "off", False),
        (bool, "yes", True),
        (WorkerRole, "prefill", WorkerRole.PREFILL),
        (Path | None, "", None),
        (Path | None, "/x", Path("/x")),
        (tuple[str, ...], "a, b,", ("a", "b")),
        (float, "1.5", 1.5),
    ],
)
def test_values_are_read_in_their_usual_spelling(kind: object, text: object, value: object) -> None:
    assert parse_value(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Bytes, "12 parsecs"),
        (bool, "maybe"),
        (int, "1.5"),
        (WorkerRole, "chef"),
        (int, "-1"),
        (float, "-0.5"),
        (float, "nan"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(kind: object, text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_value(kind, text)


def test_secrets_are_masked_where_settings_are_shown() -> None:
    secrets = [option for option in options() if show_value(option, "geheim") == MASK]
    assert {f"{option.section}.{option.key}" for option in secrets} >= {
        "database.url",
        "rest.api_key",
        "sql.backend_url",
    }


def test_every_value_survives_the_way_through_the_environment() -> None:
    for option in options():
        expected = option.default.expanduser() if isinstance(option.default, Path) else option.default
        assert parse_value(option.type, value_text(option.default)) == expected, option
    assert parse_value(Secret | None, value_text(Secret("s"))) == "s"


def test_a_process_takes_flags_of_its_sections_and_any_other_by_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STRATAKV_CONFIG", raising=False)
    settings = parse_flags("x", "", ("worker",), ["--role", "decode", "--set", "meta.native_port=7"])
    assert (settings.worker.role, settings.meta.native_port) == (WorkerRole.DECODE, 7)


def test_a_flag_that_two_sections_have_belongs_to_the_first_one_named() -> None:
    argv = ["--host", "127.0.0.2", "--meta-host", "127.0.0.3"]
    settings = parse_flags("x", "", ("dmp", "meta"), argv)
    assert (settings.dmp.host, settings.meta.host) == ("127.0.0.2", "127.0.0.3")


def test_an_unknown_flag_ends_the_process_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_flags("x", "", ("worker",), ["--rule", "decode"])
    assert caught.value.code == 2
    assert "--rule" in capsys.readouterr().err


def test_a_flag_that_is_true_needs_no_value_and_lists_have_a_singular() -> None:
    argv = ["--debug-service", "--kvcm-enabled", "--address", "a:1", "--address", "b:2"]
    meta = parse_flags("p", "d", ("meta",), argv).meta
    assert (meta.debug_service, meta.kvcm_enabled, meta.addresses) == (True, True, ("a:1", "b:2"))
    assert parse_flags("p", "d", ("meta",), ["--debug-service=false"]).meta.debug_service is False


def test_a_port_of_the_kvcm_api_turns_it_on_unless_it_is_turned_off() -> None:
    assert not parse_flags("p", "d", ("meta",), []).meta.kvcm_enabled
    assert parse_flags("p", "d", ("meta",), ["--admin-http-port=1"]).meta.kvcm_enabled
    assert not parse_flags("p", "d", ("meta",), ["--admin-http-port=1", "--kvcm-enabled=no"]).meta.kvcm_enabled
