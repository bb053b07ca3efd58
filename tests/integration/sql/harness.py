"""A SQL face in a thread of its own, so that blocking clients can be tested, and a deterministic stand-in for the model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import psycopg
import uvloop

from dbnode.sql.front import SqlFront
from dbnode.sql.service import InferCall
from stratakv.errors import InvalidRequest, Overloaded
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import SqlSettings
from stratakv.sqlfunctions import ListenerAddress

START_TIMEOUT_S = 30.0
SLOW = """options => '{"delay_s": 0.05}'"""
"""For infer(): so slow that calls made one after the other would be seen."""
VERY_SLOW = """options => '{"delay_s": 30}'"""
MANY = 16
"""Inferences at a time that no row-by-row execution reaches."""
T = TypeVar("T")


class ReversingModel:
    """Answers a prompt by its reverse, after the option delay_s; keeps count of what it was asked."""

    def __init__(self) -> None:
        self.calls: list[InferCall] = []
        self.running = 0
        self.most_running = 0
        self.refused = 0
        self.cancelled = 0

    async def reserve(self, calls: Sequence[InferCall]) -> list[InferCall]:
        return list(calls)

    async def infer_text(self, call: InferCall) -> str:
        self.calls.append(call)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.running > call.options.get("running_max", self.running):
                self.refused += 1
                raise Overloaded("too much at a time")
            await asyncio.sleep(float(call.options.get("delay_s", 0)))
            if "fail" in call.options:
                raise InvalidRequest(f"the option {call.options['fail']} is wrong", hint="Leave it out.")
            return str(call.options.get("answer", call.prompt[::-1])).replace("<NUL>", "\0")
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


class FrontThread:
    """SqlFront on an event loop of its own."""

    def __init__(
        self, cluster: EmbeddedPostgres | str, settings: SqlSettings, model: ReversingModel, **options: object
    ) -> None:
        """Of a cluster that trusts everybody, or of the URL of one that does not."""
        self.settings = settings
        self.model = model
        self._options = options
        if isinstance(cluster, str):
            self.backend_url = cluster
        else:
            self.backend_url = cluster.url
            self._options = {"trusted_backend": True, "postgres_uid": cluster.uid} | options
        self._ready = threading.Event()
        self._trouble: BaseException | None = None

    def start(self) -> None:
        self._ready.clear()
        self._thread = threading.Thread(target=uvloop.run, args=(self._serve(),), daemon=True)
        self._thread.start()
        assert self._ready.wait(START_TIMEOUT_S)
        if self._trouble is not None:
            raise self._trouble

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            self.front = SqlFront(self.settings, self.backend_url, self.model, **self._options)  # type: ignore[arg-type]
            await self.front.start()
        except BaseException as error:
            self._trouble = error
            return
        finally:
            self._ready.set()
        self.settings = replace(self.settings, port=self.front.port)
        await self._stop.wait()
        await self.front.close()

    def run(self, work: Coroutine[None, None, T]) -> T:
        """On the face's own loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(START_TIMEOUT_S)

    def stop(self) -> None:
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(START_TIMEOUT_S)
            assert not self._thread.is_alive()

    def url(self, database: str, user: str = "postgres") -> str:
        """Through the relay."""
        return f"postgresql://{quote(user)}@127.0.0.1:{self.settings.port}/{quote(database)}"


@contextmanager
def front_thread(
    cluster: EmbeddedPostgres, directory: Path | None, model: ReversingModel, **settings: object
) -> Iterator[FrontThread]:
    """A running face whose listener is in `directory`, or on TCP."""
    options = {
        name: settings.pop(name)
        for name in ("trusted_backend", "postgres_uid", "statements", "explainer", "topics")
        if name in settings
    }
    own = SqlSettings(port=0, listener_dir=directory, **settings)  # type: ignore[arg-type]
    with front_on(cluster, own, model, **options) as thread:
        yield thread


@contextmanager
def front_on(
    cluster: EmbeddedPostgres | str, settings: SqlSettings, model: ReversingModel, **options: object
) -> Iterator[FrontThread]:
    """A running face with settings of its own."""
    thread = FrontThread(cluster, settings, model, **options)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop()


def address_in(directory: Path) -> ListenerAddress:
    """Of the face that `front_thread` starts with the same directory."""
    return ListenerAddress.from_settings(SqlSettings(listener_dir=directory))


def outcome(cursor: psycopg.Cursor[tuple[object, ...]], query: str, *parameters: object) -> object:
    """Rows in any order, or the SQLSTATE of the error."""
    try:
        return sorted(map(repr, cursor.execute(query, parameters or None).fetchall()))
    except psycopg.Error as error:
        return error.sqlstate
