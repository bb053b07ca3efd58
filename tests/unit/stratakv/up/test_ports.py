"""Ports of `stratakv up`: all clashes are told before anything starts."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest

from stratakv.errors import SetupError
from stratakv.settings import Settings
from stratakv.up.ports import PortChoice, choose_ports


def test_every_taken_port_is_named_with_the_setting_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        sql, rest = first.getsockname()[1], second.getsockname()[1]
        settings = Settings()
        settings = replace(settings, sql=replace(settings.sql, port=sql), rest=replace(settings.rest, port=rest))
        with pytest.raises(SetupError) as caught:
            choose_ports(settings, PortChoice.DEFAULT)
    for part in (str(sql), str(rest), "STRATAKV_SQL_PORT", "STRATAKV_REST_PORT"):
        assert part in caught.value.message
    assert "--ports auto" in str(caught.value.hint)


def test_a_port_wanted_twice_is_refused() -> None:
    settings = Settings()
    settings = replace(settings, rest=replace(settings.rest, port=settings.sql.port))
    with pytest.raises(SetupError, match="wanted twice"):
        choose_ports(settings, PortChoice.DEFAULT)


def test_auto_takes_different_free_ports_for_everything() -> None:
    ports = choose_ports(Settings(), PortChoice.AUTO)
    every = [ports.sql, ports.listener, ports.rest, ports.meta, *ports.daemons, *ports.workers]
    assert len(every) == len(set(every)) == 8
