"""Storages that hang hold up nobody, and deletions beyond what may wait are found again."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from meta_server.kvcm import files as files_module
from meta_server.kvcm.entities import Group, Instance, Storage
from meta_server.kvcm.errors import StorageFailed
from meta_server.kvcm.files import Files
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.state import KvcmState
from meta_server.kvcm.store import Changes, Loaded
from tests.support import eventually_async


def storage_at(root: Path) -> Storage:
    spec = admin.NfsStorageSpec(root_path=str(root))
    return Storage(admin.StorageConfig(global_unique_name=root.name, nfs=spec))


async def test_a_storage_that_hangs_fails_in_time_and_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MAKE_TIMEOUT_S", 0.2)
    hung, well = storage_at(tmp_path / "hung"), storage_at(tmp_path / "well")
    for storage in (hung, well):
        (tmp_path / storage.name).mkdir()
    # Writing to a pipe that nobody reads blocks, as a file system does whose server is gone.
    pipe = tmp_path / "hung" / f".stratakv-probe-{os.getpid()}"
    os.mkfifo(pipe)
    files = Files(time.monotonic, lambda _: None, probe_s=60.0)
    try:
        with pytest.raises(StorageFailed, match="does not answer"):
            await files.check(hung.place)
        await files.check(well.place)
        files.tick([hung, well])
        await eventually_async(lambda: (hung.health.takes_blocks, well.health.takes_blocks) == (False, True))
    finally:
        threading.Thread(target=pipe.read_bytes).start()
        await files.close()


class Journal:
    """Says of everything that it is written."""

    def check_room(self) -> None:
        """There is."""

    def execute(self, *_: object) -> None:
        """Nothing is kept."""

    def all_written(self) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done


async def test_more_deletions_than_may_wait_are_done_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "DELETIONS_MAX", 4)
    journal: Any = Journal()
    storage, group = storage_at(tmp_path), Group(admin.InstanceGroup(name="g"))
    specs = [meta.LocationSpecInfo(name="kv", size=1)]
    config = meta.RegisterInstanceRequest(instance_id="i", instance_group="g", block_size=1, location_spec_infos=specs)
    instance = Instance(config)
    state = KvcmState(
        Changes(journal),
        time.monotonic,
        Loaded([storage], [group], [instance], [], []),
        open_writes_max=10,
        probe_s=60.0,
    )
    wanted = [(key, instance.layout()) for key in range(20)]
    write, _ = state.start(instance, wanted, storage.place, timeout_s=60.0)
    assert write is not None
    await state.files.prepare(storage.place, instance.id)
    written = [tmp_path / "i-i" / name for chunk in range(20) for name in write.names(chunk)]
    for file in written:
        file.touch()
    state.finish("i", write.session_id, bytes([1]) * 20)
    await eventually_async(lambda: len(state.served(instance)) == 20)
    assert state.remove(state.served(instance)) == 20

    async def are_gone() -> bool:
        state.tick()
        assert state.files.waiting(storage.place) <= 4
        return not any(file.exists() for file in written)

    await eventually_async(are_gone)
    await state.files.close()


async def test_what_a_storage_was_before_it_was_changed_is_let_go_when_nothing_of_it_is_left(tmp_path: Path) -> None:
    files = Files(time.monotonic, lambda _: None, probe_s=0.0)
    storages = [storage_at(tmp_path / name) for name in ("before", "after")]
    for storage in storages:
        await files.prepare(storage.place, "i")
    num_threads = threading.active_count()
    files.tick(storages[1:])
    await eventually_async(lambda: threading.active_count() < num_threads)
    await files.prepare(storages[0].place, "i")
    await files.close()
