"""`stratakv meta`: groups, instances, storages, write sessions, accounts and the leader of the KVCM API. A file per thing."""

from __future__ import annotations

import typer

from stratakv.cli.meta import accounts, groups, instances, leader, servers, sessions, storages

app = typer.Typer(
    help="The meta server's KVCM API: quotas, instances, storages, accounts, the leader.", no_args_is_help=True
)
app.add_typer(groups.app, name="groups")
app.add_typer(instances.app, name="instances")
app.add_typer(storages.app, name="storages")
app.command("sessions")(sessions.sessions)
app.add_typer(accounts.app, name="accounts")
app.add_typer(leader.app, name="leader")
app.add_typer(servers.app, name="servers")
