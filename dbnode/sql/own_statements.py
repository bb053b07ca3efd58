"""The gateway's own statements on a client's backend, before the client's: bind the session, ask whether to look ahead, and
the pass that does. Free of I/O."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dbnode.sql.client_batch import Batch
from dbnode.sql.own_exchange import OwnExchange, OwnStatement, text_columns, text_parameters

_PREFIX = "stratakv_gateway_"
_OFF = ("off", "false", "no", "0")
_CHECK = b"""\
SELECT NOT EXISTS (
         SELECT FROM pg_catalog.pg_proc WHERE provolatile = 'v' AND proname = ANY ($1::pg_catalog.name[])),
       pg_catalog.current_setting('stratakv.hints', true),
       (1000 * EXTRACT(epoch FROM pg_catalog.current_setting('statement_timeout')::interval))::bigint,
       (1000 * EXTRACT(epoch FROM pg_catalog.current_setting('idle_session_timeout')::interval))::bigint"""
_BIND = b"SELECT stratakv.bind($1, $2)"
_BEGIN = OwnStatement(_PREFIX + "begin", b"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY NOT DEFERRABLE")
_ROLLBACK = OwnStatement(_PREFIX + "rollback", b"ROLLBACK")
# A scan that joins another one in the middle would show other rows to a LIMIT each time.
_SET = (
    b"SELECT pg_catalog.set_config('statement_timeout', $1, true),"
    b" pg_catalog.set_config('synchronize_seqscans', 'off', true)"
)


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the check found."""

    may_collect: bool
    statement_timeout_s: float | None
    idle_timeout_s: float | None

    def order_budget_s(self, wanted_s: float) -> float:
        """For putting fields in order: never so long that a timeout of the session passes by it."""
        timeouts = [t / 2 for t in (self.statement_timeout_s, self.idle_timeout_s) if t is not None]
        return min([wanted_s, *timeouts])


def bind_exchange(nonce: str, listener: str) -> OwnExchange:
    """Tie the session to its connection of the listener."""
    return OwnExchange([OwnStatement(_PREFIX + "bind", _BIND, parameters=text_parameters([nonce, listener]))])


def check_exchange(functions: Iterable[str], *, sync_first: bool) -> OwnExchange:
    """Ask whether a function of these names is volatile, and for settings of the session."""
    names = "{" + ",".join(_quoted(name) for name in sorted(functions)) + "}"
    check = OwnStatement(_PREFIX + "check", _CHECK, parameters=text_parameters([names]))
    return OwnExchange([check], sync_first=sync_first)


def circumstances(exchange: OwnExchange) -> Circumstances:
    """Of a check that is done."""
    if exchange.row is None:
        return Circumstances(False, None, None)
    is_stable, hints, statement_ms, idle_ms = text_columns(exchange.row)
    may_collect = is_stable == "t" and (hints or "on").lower() not in _OFF
    return Circumstances(may_collect, _seconds(statement_ms), _seconds(idle_ms))


def pass_exchange(batch: Batch, select: str, timeout_s: float) -> OwnExchange:
    """Run the SELECT in a read-only transaction that leaves nothing behind."""
    timeout_ms = str(max(1, round(timeout_s * 1000)))
    return OwnExchange(
        [
            _BEGIN,
            OwnStatement(_PREFIX + "set", _SET, parameters=text_parameters([timeout_ms])),
            OwnStatement(_PREFIX + "collect", select.encode(), batch.prepared.types, batch.parameters),
        ],
        last=_ROLLBACK,
    )


def rollback_exchange() -> OwnExchange:
    """Again, after something has interrupted the first one."""
    return OwnExchange([], last=_ROLLBACK)


def _seconds(milliseconds: str | None) -> float | None:
    """None for no timeout."""
    return int(milliseconds) / 1000 if milliseconds is not None and int(milliseconds) > 0 else None


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
