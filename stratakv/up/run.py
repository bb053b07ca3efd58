"""What `stratakv up` does: model, database, schema and functions first, then the services under their supervisor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from stratakv import migrate, sqlfunctions
from stratakv.backend import client_parameters, client_url
from stratakv.errors import SetupError
from stratakv.log import configure_logging
from stratakv.models.progress import pull_with_progress
from stratakv.postgres import EmbeddedPostgres
from stratakv.process import reachable_host
from stratakv.settings import Secret, Settings
from stratakv.up.plan import ServiceSpec, make_plan, place_ports
from stratakv.up.ports import PortChoice, choose_ports
from stratakv.up.readiness import Readiness
from stratakv.up.state import FILE_NAME, StateFile
from stratakv.up.supervisor import Supervisor

_INTERRUPTED = 128


def run_up(settings: Settings, ports: PortChoice, state_file: Path | None) -> None:
    """Run everything until a signal. Raises SetupError."""
    configure_logging(settings.log)
    chosen = choose_ports(settings, ports)
    settings = place_ports(settings, chosen)
    console = Console(stderr=True)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    home = settings.up.data_dir.expanduser().absolute()
    log_dir = home / "log"
    model_dir = pull_with_progress(settings.model.name, settings.model.cache_dir)
    say(f"model     {settings.model.name} in {model_dir}")
    with _database(settings, home) as (cluster, ready_settings):
        url = str(ready_settings.database.url)
        migrate.upgrade(url)
        say(f"database  {migrate.masked_url(url)}")
        say(f"functions {install_functions(ready_settings)}")
        log_dir.mkdir(parents=True, exist_ok=True)
        plan = make_plan(ready_settings, chosen)
        state = StateFile(state_file or home / FILE_NAME, ready_settings)
        asyncio.run(_run(ready_settings, plan, cluster, log_dir, state, console))
    say("stopped")


@contextlib.contextmanager
def _database(settings: Settings, home: Path) -> Iterator[tuple[EmbeddedPostgres | None, Settings]]:
    """The database that was configured, or the embedded one, running until the end; and the settings that reach it."""
    if settings.database.url is not None:
        yield None, _with_key(settings, home)
        return
    with EmbeddedPostgres(settings.postgres, home / "postgres") as cluster:
        ready = replace(settings, database=replace(settings.database, url=Secret(cluster.url)))
        if settings.sql.backend_url is not None:
            yield cluster, _with_key(ready, home)
            return
        listener_dir = settings.sql.listener_dir or cluster.listener_dir()
        sql = replace(settings.sql, listener_dir=listener_dir, backend_trusted=True, backend_uid=cluster.uid)
        yield cluster, replace(ready, sql=sql)


def _with_key(settings: Settings, home: Path) -> Settings:
    """A PostgreSQL of the user's own calls back over TCP, unless told otherwise, with a key that is made once."""
    if settings.sql.listener_dir is not None or settings.sql.listener_key is not None:
        return settings
    key = Secret(sqlfunctions.kept_key(home))
    return replace(settings, sql=replace(settings.sql, listener_key=key))


def install_functions(settings: Settings) -> str:
    """Put infer() into the backend's database, if one is named; what was done. Raises SetupError."""
    if "dbname" not in client_parameters(settings):
        return "sql.backend_url names no database; `stratakv install --database URL` puts infer() into one"
    url = settings.sql.backend_url or settings.database.url
    assert url is not None, "no database"
    try:
        sqlfunctions.install(url, sqlfunctions.ListenerAddress.from_settings(settings.sql))
    except sqlfunctions.NotAllowed as error:
        if sqlfunctions.is_installed(url):
            return f"installed before in {migrate.masked_url(url)}; this role may not renew them"
        raise SetupError(
            f"infer() cannot be installed in {migrate.masked_url(url)}: {error.message}",
            hint="Install it once with `stratakv install --database URL` as a superuser, or as the role that may create"
            " extensions on a managed PostgreSQL; then start again.",
        ) from error
    return f"infer() in {migrate.masked_url(url)}"


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
        f"  SQL    psql {client_url(settings)}      SELECT infer('Why is the sky blue?');",
        f"  REST   http://{reachable_host(rest.host)}:{rest.port}/v1      the base URL for OpenAI clients",
        f"  state  {state_path}",
        "Ctrl-C stops it.",
        "",
    ]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
