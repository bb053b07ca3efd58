"""The gateway's own statements on a client's backend, before the client's: bind the session, ask whether to look ahead, and
the pass that does. Free of I/O.

Outside a transaction each runs in one of its own; within the client's they run behind a savepoint, to which the transaction
goes back: settings, locks and portals are then as before, and an error of ours is none of the client's.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dbnode.sql.client_batch import Batch
from dbnode.sql.hidden_calls import LEARN
from dbnode.sql.messages import TRANSACTION_IDLE, TRANSACTION_OPEN
from dbnode.sql.own_exchange import OwnExchange, OwnStatement, text_columns, text_parameters
from dbnode.sql.trust import DEMAND_OUR_BIND, NULL_HIDES_ROWS

_PREFIX = "stratakv_gateway_"
_OFF = ("off", "false", "no", "0")
_ON = ("on", "true", "yes", "1")
_BIND = b"SELECT stratakv.bind($1, $2)"
_CHECK = f"""\
SELECT NOT EXISTS (
         SELECT FROM pg_catalog.pg_proc p WHERE p.provolatile OPERATOR(pg_catalog.=) 'v'::pg_catalog."char"
         AND p.proname OPERATOR(pg_catalog.=) ANY ($1::pg_catalog.name[]))
       AND ({NULL_HIDES_ROWS}),
       pg_catalog.current_setting('stratakv.hints', true),
       CASE WHEN EXISTS (
           SELECT FROM pg_catalog.pg_proc p
           WHERE p.pronamespace OPERATOR(pg_catalog.=) pg_catalog.to_regnamespace('stratakv')::pg_catalog.oid
             AND p.proname OPERATOR(pg_catalog.=) 'infer'::pg_catalog.name
             AND pg_catalog.strpos(p.prosrc, 'flush') OPERATOR(pg_catalog.>) 0)
           THEN pg_catalog.current_setting('stratakv.stream', true) END,
       EXTRACT(epoch FROM pg_catalog.current_setting('statement_timeout')::interval),
       EXTRACT(epoch FROM pg_catalog.current_setting('idle_session_timeout')::interval),
       EXTRACT(epoch FROM pg_catalog.current_setting('idle_in_transaction_session_timeout')::interval),
       EXTRACT(epoch FROM pg_catalog.current_setting('transaction_timeout', true)::interval),
       EXTRACT(epoch FROM pg_catalog.clock_timestamp() OPERATOR(pg_catalog.-) pg_catalog.now())""".encode()
"""The client's search_path holds while it runs; see `dbnode.sql.trust`."""
_BEGIN = OwnStatement(_PREFIX + "begin", b"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY NOT DEFERRABLE")
_ROLLBACK = OwnStatement(_PREFIX + "rollback", b"ROLLBACK")
_SAVEPOINT = OwnStatement(_PREFIX + "savepoint", b"SAVEPOINT stratakv_gateway")
_ROLLBACK_TO = OwnStatement(_PREFIX + "rollback", b"ROLLBACK TO SAVEPOINT stratakv_gateway")
_RELEASE = OwnStatement(_PREFIX + "release", b"RELEASE SAVEPOINT stratakv_gateway")
# A scan that joins another one in the middle would show other rows to a LIMIT each time.
_SET = b"""\
SELECT pg_catalog.set_config('statement_timeout', $1, true),
       pg_catalog.set_config('synchronize_seqscans', 'off', true),
       pg_catalog.set_config('transaction_read_only', 'on', true)"""


class Within(enum.Enum):
    """Where a statement of the gateway's runs, by the transaction status of the session."""

    NOTHING = TRANSACTION_IDLE
    TRANSACTION = TRANSACTION_OPEN


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the check found; None for no limit."""

    may_collect: bool
    checked_s: float
    """When it began, on the event loop's clock."""
    may_stream: bool = False
    statement_s: float | None = None
    """Longest time of a statement."""
    idle_s: float | None = None
    """Longest time that the session may have nothing to do, where it is."""
    transaction_left_s: float | None = None

    def order_budget_s(self, wanted_s: float) -> float:
        """For putting fields in order: never so long that a timeout of the session passes by it."""
        timeouts = [t / 2 for t in (self.statement_s, self.idle_s, self.transaction_left_s) if t is not None]
        return min([wanted_s, *timeouts])


def bind_exchange(within: Within, nonce: str, listener: str) -> OwnExchange:
    """Tie the session to its connection of the listener, if the function that does it is ours."""
    demand = OwnStatement(_PREFIX + "demand", DEMAND_OUR_BIND)
    bind = OwnStatement(_PREFIX + "bind", _BIND, parameters=text_parameters([nonce, listener]))
    return _exchange(within, demand, bind)


def learn_exchange() -> OwnExchange:
    """Ask which views call infer()."""
    return OwnExchange([OwnStatement(_PREFIX + "learn", LEARN)])


def check_exchange(within: Within, functions: Iterable[str], *, sync_first: bool) -> OwnExchange:
    """Ask whether a function of these names is volatile, and for settings of the session."""
    names = "{" + ",".join(_quoted(name) for name in sorted(functions)) + "}"
    check = OwnStatement(_PREFIX + "check", _CHECK, parameters=text_parameters([names]))
    return _exchange(within, check, sync_first=sync_first)


def _exchange(within: Within, *statements: OwnStatement, sync_first: bool = False) -> OwnExchange:
    """Of statements that are no pass, and need no transaction."""
    if within is Within.NOTHING:
        return OwnExchange(statements, sync_first=sync_first)
    return OwnExchange([_SAVEPOINT, *statements], _end(within), sync_first=sync_first)


def circumstances(exchange: OwnExchange, within: Within, checked_s: float) -> Circumstances:
    """Of a check that is done."""
    if exchange.row is None:
        return Circumstances(may_collect=False, checked_s=checked_s)
    may_look, hints, stream, *times = text_columns(exchange.row)
    may_collect = may_look == "t" and (hints or "on").lower() not in _OFF
    may_stream = (stream or "off").lower() in _ON
    statement_s, idle_s, idle_in_transaction_s, transaction_s, age_s = (_seconds(time) for time in times)
    if within is Within.NOTHING:
        return Circumstances(may_collect, checked_s, may_stream, statement_s, idle_s)
    left_s = None if transaction_s is None else transaction_s - (age_s or 0.0)
    return Circumstances(may_collect, checked_s, may_stream, statement_s, idle_in_transaction_s, left_s)


def pass_exchange(within: Within, batch: Batch, select: str, timeout_s: float) -> OwnExchange:
    """Run the SELECT read-only, and leave nothing behind."""
    timeout_ms = str(max(1, round(timeout_s * 1000)))
    return OwnExchange(
        [
            _BEGIN if within is Within.NOTHING else _SAVEPOINT,
            OwnStatement(_PREFIX + "set", _SET, parameters=text_parameters([timeout_ms])),
            OwnStatement(_PREFIX + "collect", select.encode(), batch.prepared.types, batch.parameters),
        ],
        _end(within),
    )


def end_exchange(within: Within) -> OwnExchange:
    """Go back again, after something has interrupted the first time."""
    return OwnExchange((), _end(within))


def _end(within: Within) -> Sequence[OwnStatement]:
    return (_ROLLBACK,) if within is Within.NOTHING else (_ROLLBACK_TO, _RELEASE)


def _seconds(text: str | None) -> float | None:
    """None for no timeout."""
    return float(text) if text is not None and float(text) > 0 else None


def _quoted(name: str) -> str:
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
