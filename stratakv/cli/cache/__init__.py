"""`stratakv cache`: what the pool holds, and an operator's word on it. A file per kind of command."""

from __future__ import annotations

import typer

from stratakv.cli.cache import change, stats, verify

app = typer.Typer(help="Look at the cache, check it, and rule it.", no_args_is_help=True)
app.command("stats")(stats.stats)
app.command("verify")(verify.verify)
app.command("flush")(change.flush)
app.command("rule")(change.rule)
app.command("pin")(change.pin)
app.command("unpin")(change.unpin)
app.command("resize")(change.resize)
