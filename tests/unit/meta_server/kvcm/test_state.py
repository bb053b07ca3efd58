"""The KVCM state with many blocks: it is made and emptied without holding up the event loop, which renews the lease."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from meta_server.kvcm import state as state_module
from meta_server.kvcm.entities import Instance, default_group, default_storage
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.state import KvcmState
from meta_server.kvcm.store import Changes, Loaded
from meta_server.kvcm.writes import State, Write
from tests.support import eventually_async

NUM_BLOCKS = 100


class Journal:
    """Counts what is handed in, which belongs to the event loop's thread, and says that it is written."""

    def __init__(self) -> None:
        self.num_statements = 0

    def execute(self, *_: object) -> None:
        asyncio.get_running_loop()
        self.num_statements += 1

    def all_written(self) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


def loaded() -> Loaded:
    specs = [meta.LocationSpecInfo(name="kv", size=8)]
    config = meta.RegisterInstanceRequest(instance_id="i", instance_group="default", location_spec_infos=specs)
    storage, instance = default_storage("/nowhere"), Instance(config)
    write = Write(
        session_id="s",
        instance_id="i",
        group="default",
        place=storage.place,
        layouts=(instance.layout(),),
        layout_of=bytes(NUM_BLOCKS),
        keys=tuple(range(NUM_BLOCKS)),
        status=bytearray([State.SERVING] * NUM_BLOCKS),
        created_s=1,
        ends_at=0.0,
        success=bytes([1] * NUM_BLOCKS),
    )
    return Loaded([storage], [default_group()], [instance], [write], [])


async def test_it_is_made_on_any_thread_and_emptied_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "REMOVED_PER_TURN", 10)
    journal: Any = Journal()
    state = await asyncio.to_thread(
        KvcmState, Changes(journal), time.monotonic, loaded(), open_writes_max=10, probe_s=60.0
    )
    group, instance = state.group("default"), state.instance("i")
    assert (group.num_keys, group.used(None), state.usage_of("nfs_01").num_keys) == (
        NUM_BLOCKS,
        8 * NUM_BLOCKS,
        NUM_BLOCKS,
    )
    state.add_defaults("/elsewhere")
    assert journal.num_statements == 0

    seen = []

    async def look() -> None:
        while state.served(instance):
            seen.append(len(state.served(instance)))
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    await state.remove_instance(instance)
    await looking
    assert len(set(seen)) >= NUM_BLOCKS // 10 - 1
    assert (group.num_keys, group.used(None), state.usage_of("nfs_01").size_bytes) == (0, 0, 0)
    assert "i" not in state.instances
    await state.files.close()


async def test_a_removal_goes_on_when_who_asked_for_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "REMOVED_PER_TURN", 10)
    journal: Any = Journal()
    state = KvcmState(Changes(journal), time.monotonic, loaded(), open_writes_max=10, probe_s=60.0)
    asking = asyncio.create_task(state.to_the_end(state.remove_storage("nfs_01")))
    await asyncio.sleep(0)
    asking.cancel()
    await eventually_async(lambda: not state.served(state.instance("i")))
    assert state.storages == {}
    await state.files.close()


async def test_what_there_is_at_the_first_start_is_written_down() -> None:
    journal: Any = Journal()
    state = KvcmState(Changes(journal), time.monotonic, Loaded([], [], [], [], []), open_writes_max=10, probe_s=60.0)
    state.add_defaults("/nowhere")
    assert (list(state.storages), list(state.groups), journal.num_statements) == (["nfs_01"], ["default"], 2)
