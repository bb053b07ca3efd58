"""The command line: `stratakv …`. A file per group of commands; this one puts them together and turns errors into messages."""

from __future__ import annotations

import sys

import typer

from stratakv.cli import (
    bench,
    cache,
    chat,
    config,
    drain,
    functions,
    meta,
    migrate,
    model,
    profile,
    serve,
    sim,
    sql,
    status,
    tenancy,
    up,
    usage,
    version,
)
from stratakv.cli.options import printable
from stratakv.errors import SetupError, StrataError

EXIT_FAILED = 1
EXIT_SETUP = 2
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="stratakv",
    help="LLM inference behind a database.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("up")(up.up)
app.command("serve", context_settings=serve.PASS_ON)(serve.serve)
app.add_typer(migrate.app, name="migrate")
app.command("install")(functions.install)
app.command("uninstall")(functions.uninstall)
app.command("sql", context_settings=sql.PASS_ON)(sql.sql)
app.command("chat")(chat.chat)
app.add_typer(model.app, name="model")
app.command("profile")(profile.profile)
app.add_typer(cache.app, name="cache")
app.add_typer(drain.app, name="drain")
app.add_typer(meta.app, name="meta")
app.add_typer(tenancy.tenant, name="tenant")
app.add_typer(tenancy.key, name="key")
app.add_typer(tenancy.quota, name="quota")
app.command("usage")(usage.usage)
app.command("status")(status.status)
app.add_typer(config.app, name="config")
app.command("bench", context_settings=serve.PASS_ON)(bench.bench)
app.command("sim", context_settings=serve.PASS_ON)(sim.sim)
app.command("version")(version.version)


def main() -> None:
    """Entry point of the program `stratakv`."""
    try:
        app()
    except StrataError as error:
        print(f"stratakv: {printable(error.message)}", file=sys.stderr)
        if error.hint:
            print(f"stratakv: {printable(error.hint)}", file=sys.stderr)
        sys.exit(EXIT_SETUP if isinstance(error, SetupError) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has left, as `head` does
        sys.exit(EXIT_FAILED)
