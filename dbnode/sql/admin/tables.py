"""The SHOW commands. Columns have PgBouncer's names where they mean the same; none holds a prompt, an answer or a literal."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from dbnode.sql.admin.login import Viewer
from dbnode.sql.admin.table import Table, Value, columns
from dbnode.sql.errors import NotSupported
from dbnode.sql.session_facts import SessionFacts, SessionState, facts_of
from dbnode.sql.statement_meter import StatementMeter
from stratakv.errors import PermissionDenied
from stratakv.version import version

if TYPE_CHECKING:
    from dbnode.sql.relay import Relay

_HELP = {
    "SHOW CLIENTS": "sessions of clients",
    "SHOW SERVERS": "their connections to PostgreSQL, one each",
    "SHOW POOLS": "the same, counted by database and user",
    "SHOW STATEMENTS": "statements that wait for the model now, or have asked it, and how far they are",
    "SHOW STATS": "sums by database since the DB node started; for superusers and members of pg_monitor",
    "SHOW VERSION": "version of the DB node",
    "SHOW HELP": "this list",
}
_CLIENTS = columns(
    "type user database state addr port# connect_time request_time link remote_pid# tls application_name id"
)
_SERVERS = columns("type user database state addr port# connect_time request_time link remote_pid# application_name id")
_POOLS = columns(
    "database user cl_active# cl_waiting# cl_waiting_model# sv_active# sv_idle# sv_login# maxwait# maxwait_us# pool_mode"
)
_STATEMENTS = columns(
    "id user role database remote_pid# state elapsed_ms# prompts_done# prompts_total# infer_calls# memo_hits#"
    " prompt_tokens# cached_tokens# generated_tokens# wait_ms# query"
)
_STATS = columns(
    "database total_query_count# total_received# total_sent# total_statement_count# total_infer_calls#"
    " total_distinct_prompts# total_memo_hits# total_prompt_tokens# total_cached_tokens# total_generated_tokens#"
    " total_infer_errors# total_model_wait_time#"
)
_US_PER_S = 1_000_000


class Show:
    """What one client sees."""

    def __init__(self, relay: Relay, viewer: Viewer) -> None:
        self._relay = relay
        self._viewer = viewer
        self._tables: dict[str, Callable[[], Table]] = {
            "clients": self._clients,
            "servers": self._servers,
            "pools": self._pools,
            "statements": self._statements,
            "stats": self._stats,
            "version": lambda: Table(columns("version"), [(f"StrataKV {version()}",)]),
            "help": lambda: Table(columns("command description"), list(_HELP.items())),
        }

    def run(self, statement: str) -> Table:
        """Raises NotSupported, PermissionDenied."""
        words = statement.lower().split()
        table = self._tables.get(words[1]) if len(words) == 2 and words[0] == "show" else None
        if table is None:
            hint = f"Say {', '.join(_HELP)}; and leave transactions to other databases (autocommit)."
            raise NotSupported("the admin database knows only SHOW commands", hint=hint)
        return table()

    def _facts(self) -> list[SessionFacts]:
        """Sessions that may be seen, those of the admin database left out."""
        found = [facts_of(session) for session in self._relay.sessions if session.console is None]
        return [facts for facts in found if self._viewer.sees_all or facts.user == self._viewer.user]

    def _clients(self) -> Table:
        return Table(
            _CLIENTS,
            [
                (
                    *("C", f.user, f.database, f.state.value, f.address, f.port, _time(f.connected_at_s)),
                    *(_time(f.requested_at_s), _link(f), f.pid, f.tls, f.application, f.name),
                )
                for f in self._facts()
            ],
        )

    def _servers(self) -> Table:
        address = self._relay.backend_address
        return Table(
            _SERVERS,
            [
                (
                    *("S", f.user, f.database, f.server_state.value, address.host, address.port),
                    *(_time(f.connected_at_s), _time(f.requested_at_s), f.name, f.pid, f.application, _link(f)),
                )
                for f in self._facts()
                if f.pid is not None
            ],
        )

    def _pools(self) -> Table:
        pools: dict[tuple[str, str], Counter[str]] = {}
        now_s = time.time()
        for f in self._facts():
            pool = pools.setdefault((f.database, f.user), Counter())
            if f.state is SessionState.LOGIN:
                pool["cl_waiting"] += 1
                pool["sv_login"] += 1
                pool["maxwait_us"] = max(pool["maxwait_us"], round((now_s - f.connected_at_s) * _US_PER_S))
                continue
            pool["cl_active"] += 1
            pool["cl_waiting_model"] += f.state is SessionState.WAITING
            pool["sv_active" if f.server_state is SessionState.ACTIVE else "sv_idle"] += 1
        counted = ("cl_active", "cl_waiting", "cl_waiting_model", "sv_active", "sv_idle", "sv_login")
        rows: list[tuple[Value, ...]] = []
        for (database, user), pool in sorted(pools.items()):
            seconds, micros = divmod(pool["maxwait_us"], _US_PER_S)
            rows.append((database, user, *(pool[name] for name in counted), seconds, micros, "session"))
        return Table(_POOLS, rows)

    def _statements(self) -> Table:
        facts = {f.name: f for f in self._facts()}
        running = self._relay.book.running
        return Table(_STATEMENTS, [_statement(m, facts[m.session]) for m in running if m.session in facts])

    def _stats(self) -> Table:
        if not self._viewer.sees_all:
            raise PermissionDenied("SHOW STATS is for superusers and members of pg_monitor")
        traffic, sums = self._relay.traffic, self._relay.book.by_database
        rows: list[tuple[Value, ...]] = []
        for database in sorted(traffic.keys() | sums.keys()):
            moved, found = traffic.get(database), sums.get(database)
            rows.append(
                (
                    database,
                    *((moved.num_queries, moved.received_bytes, moved.sent_bytes) if moved else (0, 0, 0)),
                    *(
                        (found.calls, found.infer_calls, found.distinct_prompts, found.memo_hits, found.prompt_tokens)
                        if found
                        else (0,) * 5
                    ),
                    *((found.cached_tokens, found.generated_tokens, found.errors) if found else (0,) * 3),
                    round(found.wait_ms * 1000) if found else 0,
                )
            )
        return Table(_STATS, rows)


def _statement(meter: StatementMeter, facts: SessionFacts) -> tuple[Value, ...]:
    counts = meter.counts
    elapsed_s = asyncio.get_running_loop().time() - meter.started_s
    return (
        *(facts.name, facts.user, meter.role, meter.database, facts.pid, facts.state.value, round(elapsed_s * 1000)),
        *(meter.num_done, counts.distinct_prompts, counts.infer_calls, counts.memo_hits, counts.prompt_tokens),
        *(counts.cached_tokens, counts.generated_tokens, round(counts.wait_ms), meter.query),
    )


def _link(facts: SessionFacts) -> str:
    """The other half of a session."""
    return f"{facts.name}-server"


def _time(at_s: float | None) -> str | None:
    return None if at_s is None else datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
