"""What `stratakv up` does: model, database, schema and functions first, then the services under their supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from stratakv import migrate, sqlfunctions
from stratakv.log import configure_logging
from stratakv.models.progress import pull_with_progress
from stratakv.postgres import EmbeddedPostgres
from stratakv.process import reachable_host
from stratakv.settings import Secret, Settings
from stratakv.up.plan import ServiceSpec, make_plan, place_ports
from stratakv.up.ports import PortChoice, choose_ports
from stratakv.up.readiness import Readiness
from stratakv.up.state import StateFile, sql_url
from stratakv.up.supervisor import Supervisor

_INTERRUPTED = 128
LISTENER_KEY_BYTES = 32


def run_up(settings: Settings, ports: PortChoice, state_file: Path | None) -> None:
    """Run everything until a signal. Raises SetupError."""
    configure_logging(settings.log)
    chosen = choose_ports(settings, ports)
    settings = place_ports(settings, chosen)
    console = Console(stderr=True)
    home = settings.up.data_dir.expanduser().absolute()
    log_dir = home / "log"
    model_dir = pull_with_progress(settings.model.name, settings.model.cache_dir)
    console.print(f"model     {settings.model.name} in {model_dir}", highlight=False, markup=False, soft_wrap=True)
    with _database(settings, home) as (cluster, ready_settings):
        url = str(ready_settings.database.url)
        migrate.upgrade(url)
        if ready_settings.sql.backend_url is None:
            sqlfunctions.install(url, sqlfunctions.ListenerAddress.from_settings(ready_settings.sql))
        console.print(f"database  {migrate.masked_url(url)}", highlight=False, markup=False, soft_wrap=True)
        log_dir.mkdir(parents=True, exist_ok=True)
        plan = make_plan(ready_settings, chosen)
        state = StateFile(state_file or home / "up.json", ready_settings)
        asyncio.run(_run(ready_settings, plan, cluster, log_dir, state, console))
    console.print("stopped", highlight=False)


@contextlib.contextmanager
def _database(settings: Settings, home: Path) -> Iterator[tuple[EmbeddedPostgres | None, Settings]]:
    """The database that was configured, or the embedded one, running until the end; and the settings that reach it."""
    sql = settings.sql
    if settings.database.url is not None:
        if sql.listener_dir is None and sql.listener_key is None:
            sql = replace(sql, listener_key=_kept_listener_key(home))
        yield None, replace(settings, sql=sql)
        return
    with EmbeddedPostgres(settings.postgres, home / "postgres") as cluster:
        sql = replace(sql, listener_dir=sql.listener_dir or cluster.listener_dir())
        if sql.backend_url is None:
            sql = replace(sql, backend_trusted=True, backend_uid=cluster.uid)
        yield cluster, replace(settings, database=replace(settings.database, url=Secret(cluster.url)), sql=sql)


def _kept_listener_key(home: Path) -> Secret:
    """The key by which PostgreSQL knows itself to the DB node over TCP; made once."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = home / "listener.key"
    with (
        contextlib.suppress(FileExistsError),
        open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file,
    ):
        file.write(secrets.token_urlsafe(LISTENER_KEY_BYTES))
    return Secret(path.read_text())


async def _run(
    settings: Settings,
    plan: list[ServiceSpec],
    cluster: EmbeddedPostgres | None,
    log_dir: Path,
    state: StateFile,
    console: Console,
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(_INTERRUPTED + number)  # all children end with this process
        console.print("stopping: finishing what is in flight; once more ends it at once", highlight=False)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    announced = False

    def on_change(supervisor: Supervisor) -> None:
        nonlocal announced
        state.write(supervisor)
        if supervisor.is_ready and not announced:
            announced = True
            _announce(settings, state.path, console)

    with console.status("starting") as shown:
        waiting = [spec.name for spec in plan]

        def on_service_ready(spec: ServiceSpec) -> None:
            waiting.remove(spec.name)
            console.print(f"ready     {spec.name:10} {spec.url}", highlight=False, markup=False, soft_wrap=True)
            shown.update(f"waiting for {', '.join(waiting)}" if waiting else "ready")
            if not waiting:
                shown.stop()

        try:
            async with Readiness(settings) as readiness:
                supervisor = Supervisor(
                    plan,
                    readiness=readiness,
                    cluster=cluster,
                    log_dir=log_dir,
                    on_service_ready=on_service_ready,
                    on_change=on_change,
                )
                await supervisor.run(stop)
        finally:
            state.remove()


def _announce(settings: Settings, state_path: Path, console: Console) -> None:
    """The ready banner."""
    rest = settings.rest
    lines = [
        "",
        "StrataKV is ready.",
        f"  SQL    psql {sql_url(settings)}      SELECT infer('Why is the sky blue?');",
        f"  REST   http://{reachable_host(rest.host)}:{rest.port}/v1      the base URL for OpenAI clients",
        f"  state  {state_path}",
        "Ctrl-C stops it.",
        "",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
