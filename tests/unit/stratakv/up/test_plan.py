"""The plan of `stratakv up`: order, names and what each process is told."""

from __future__ import annotations

from dataclasses import replace

from stratakv.config import load_settings
from stratakv.settings import Secret, Settings
from stratakv.up.plan import Kind, make_plan
from stratakv.up.ports import Ports

PORTS = Ports(sql=1, listener=2, rest=3, meta=4, daemons=(5, 6), workers=(7, 8))
BASE = Settings()
SETTINGS = replace(
    BASE,
    database=replace(BASE.database, url=Secret("postgresql:///x")),
    meta=replace(BASE.meta, native_port=4),
    sql=replace(BASE.sql, port=1),
    rest=replace(BASE.rest, port=3),
)


def test_services_start_after_those_they_need() -> None:
    kinds = [spec.kind for spec in make_plan(SETTINGS, PORTS)]
    assert kinds == [Kind.META, Kind.DAEMON, Kind.DAEMON, Kind.WORKER, Kind.WORKER, Kind.DB_NODE]


def test_each_process_reads_its_settings_back_from_its_environment() -> None:
    meta, first, second, prefill, decode, db_node = (load_settings(env=s.env) for s in make_plan(SETTINGS, PORTS))
    assert {s.database.url for s in (meta, first, prefill, db_node)} == {"postgresql:///x"}
    assert (meta.meta.native_port, prefill.meta.native_port) == (4, 4)
    assert [(s.dmp.node, s.dmp.port) for s in (first, second)] == [("dmp-0", 5), ("dmp-1", 6)]
    assert [(s.worker.role, s.worker.port, s.worker.node) for s in (prefill, decode)] == [
        ("prefill", 7, "dmp-0"),
        ("decode", 8, "dmp-1"),
    ]
    assert db_node.router.workers == ("http://127.0.0.1:7", "http://127.0.0.1:8")
    assert (db_node.sql.port, db_node.rest.port) == (1, 3)


def test_secrets_do_not_show_in_the_repr_of_a_service() -> None:
    settings = replace(SETTINGS, rest=replace(SETTINGS.rest, api_key=Secret("geheim")))
    assert "geheim" not in repr(make_plan(settings, PORTS))


def test_without_daemons_workers_have_no_local_one() -> None:
    plan = make_plan(SETTINGS, replace(PORTS, daemons=()))
    assert [load_settings(env=s.env).worker.node for s in plan if s.kind is Kind.WORKER] == ["", ""]
