"""Instances, groups, storages and locations in memory, and how they change: the one place that changes them.

A write is two-phase: `start` enters blocks as WRITING, `finish` makes them SERVING once that is in the database, and an open
session whose time is over gives everything back. Blocks that are removed leave memory at once; their files are deleted after
that is in the database. Nothing here waits for file systems.
"""

from __future__ import annotations

import asyncio
import heapq
import time
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass

from meta_server.kvcm.entities import Group, Instance, default_group, default_storage
from meta_server.kvcm.errors import NoSuchInstance
from meta_server.kvcm.files import Chunk, Files
from meta_server.kvcm.reclaim import Reclaimer
from meta_server.kvcm.store import Changes, Loaded
from meta_server.kvcm.writes import Layout, Location, Place, State, Write
from meta_server.presence import Clock
from stratakv.errors import InvalidRequest, Overloaded

FINISHED_KEPT_S = 600.0
"""A finished session is known so long, so that finishing may be repeated, also when its blocks are gone."""
REMOVED_PER_TURN = 2000
"""Blocks, at some microseconds each."""
NOTHING_TO_WRITE = "held"
"""The session of a write whose blocks were all there."""


@dataclass(slots=True)
class Usage:
    """Blocks and bytes of one storage."""

    num_keys: int = 0
    size_bytes: int = 0

    def count(self, num_keys: int, size_bytes: int) -> None:
        """So many more; negative ones are fewer."""
        self.num_keys += num_keys
        self.size_bytes += size_bytes


class KvcmState:
    """All that the KVCM API knows."""

    def __init__(self, changes: Changes, clock: Clock, loaded: Loaded, *, open_writes_max: int, probe_s: float) -> None:
        """Takes microseconds for each block, so it may be made on a thread of its own; nothing is changed by that."""
        self.changes = changes
        self._clock = clock
        self._open_writes_max = open_writes_max
        self.files = Files(clock, self._files_deleted, probe_s)
        self._has_more_to_delete = False
        self._unfinished: set[asyncio.Task[None]] = set()
        self._reclaimer = Reclaimer(clock, self.remove)
        self.storages = {storage.name: storage for storage in loaded.storages}
        self.groups = {group.name: group for group in loaded.groups}
        self.instances = {instance.id: instance for instance in loaded.instances}
        self.writes = {write.session_id: write for write in loaded.writes}
        self._ending: list[tuple[float, str]] = []
        self._empty: dict[str, Write] = {}
        self.open_writes: dict[str, Write] = {}
        self._usage: dict[str, Usage] = {}
        for write in loaded.writes:
            self._restore(write)

    def instance(self, instance_id: str) -> Instance:
        """Raises NoSuchInstance."""
        if (instance := self.instances.get(instance_id)) is None:
            raise NoSuchInstance(f"instance {instance_id!r} is not registered")
        return instance

    def group(self, name: str) -> Group:
        """Raises InvalidRequest."""
        if (group := self.groups.get(name)) is None:
            raise InvalidRequest(f"there is no instance group {name!r}", param="instance_group")
        return group

    def usage_of(self, storage: str) -> Usage:
        """What a storage holds of blocks being written or served."""
        return self._usage.get(storage) or Usage()

    def seconds_left(self, write: Write) -> float:
        """Of an open session."""
        return write.ends_at - self._clock()

    def holds(self, instance: Instance, wanted: Sequence[tuple[int, Layout]], min_replicas: int) -> bool:
        """Whether all of these blocks are there, or being written."""
        return not _split(instance, wanted, min_replicas)[1]

    def start(
        self,
        instance: Instance,
        wanted: Sequence[tuple[int, Layout]],
        place: Place,
        *,
        timeout_s: float,
        min_replicas: int = 1,
    ) -> tuple[Write | None, list[bool]]:
        """Enter those blocks that are not held; the session (None: all are held), and which are held.

        Raises CapacityReached, Overloaded.
        """
        held, new = _split(instance, wanted, min_replicas)
        if not new:
            return None, held
        if len(self.open_writes) >= self._open_writes_max:
            raise Overloaded("too many write sessions are open")
        group = self.group(instance.group)
        # Room must not be made with the blocks that the client is about to be told are there.
        told = [found for (key, _), h in zip(wanted, held, strict=True) if h for found in instance.by_key.get(key, ())]
        group.ranking.touch(told)
        layouts = list(dict.fromkeys(layout for _, layout in new))
        write = Write(
            session_id=uuid.uuid4().hex,
            instance_id=instance.id,
            group=instance.group,
            place=place,
            layouts=tuple(layouts),
            layout_of=bytes(layouts.index(layout) for _, layout in new),
            keys=tuple(key for key, _ in new),
            status=bytearray([State.WRITING]) * len(new),
            created_s=int(time.time()),
            ends_at=self._clock() + timeout_s,
        )
        self._reclaimer.make_room(group, write, frozenset(told))
        self.writes[write.session_id] = write
        self._open(write)
        self._enter(write, instance)
        self.changes.add_write(write, timeout_s)
        return write, held

    def finish(self, instance_id: str, session_id: str, success: bytes) -> None:
        """Decide an open session; `changes.written()` tells when readers see it. Raises InvalidRequest.

        Repeating it with the same answer does nothing; with another one it is refused.
        """
        write = self.writes.get(session_id)
        if write is None or write.instance_id != instance_id:
            raise InvalidRequest("there is no such write session, or its time is over", param="write_session_id")
        if write.success is not None:
            if write.success != success:
                raise InvalidRequest("this write session was finished otherwise, or its time is over")
            return
        if write.ends_at <= self._clock():
            self._decide(write, bytes(len(write.keys)))
            raise InvalidRequest("the time of this write session is over", param="write_session_id")
        self._decide(write, success)

    def abandon(self, write: Write) -> None:
        """Give an open session back that its client was not told of."""
        if write.is_open:
            self._decide(write, bytes(len(write.keys)))

    def remove(self, locations: Iterable[Location], *, delete_files: bool = True) -> int:
        """Take served blocks out, and see to it that their files are deleted; how many."""
        touched: dict[str, Write] = {}
        chunks: dict[Chunk, None] = {}
        removed = 0
        for location in locations:
            if location.is_serving:
                self._leave(location, State.DELETING if delete_files else State.GONE)
                touched[location.write.session_id] = location.write
                chunks[location.write, location.write.chunk_of(location.position)] = None
                removed += 1
        if touched:
            self.changes.set_status(touched.values())
            self._delete_when_written(list(chunks))
        self._empty.update({write.session_id: write for write in touched.values() if not any(write.status)})
        return removed

    async def to_the_end(self, work: Coroutine[None, None, None]) -> None:
        """Wait for it; it goes on when who waits is gone, since half a removal is none."""
        task = asyncio.create_task(work)
        self._unfinished.add(task)
        task.add_done_callback(self._unfinished.discard)
        await asyncio.shield(task)

    async def remove_in_turns(self, locations: Sequence[Location], *, delete_files: bool = True) -> None:
        """The same for any number of them: in between other calls get their turn, and the lease is renewed."""
        for first in range(0, len(locations), REMOVED_PER_TURN):
            self.remove(locations[first : first + REMOVED_PER_TURN], delete_files=delete_files)
            await asyncio.sleep(0)

    def pin(self, instance: Instance, keys: Sequence[int], pin_s: float) -> int:
        """Served blocks, up to the first key that has none, are not reclaimed for so long; how many keys."""
        until = self._clock() + pin_s
        for count, key in enumerate(keys):
            served = [location for location in instance.by_key.get(key, ()) if location.is_serving]
            if not served:
                return count
            for location in served:
                location.pinned_until = until
        return len(keys)

    async def remove_instance(self, instance: Instance) -> None:
        """Forget an instance; its open sessions are over."""
        await self.remove_in_turns(self.served(instance))
        if self.instances.get(instance.id) is not instance:
            return
        for write in [w for w in self.open_writes.values() if w.instance_id == instance.id]:
            self._decide(write, bytes(len(write.keys)))
        self.remove(self.served(instance))
        del self.instances[instance.id]
        self.changes.remove_instance(instance.id)

    async def remove_storage(self, name: str) -> None:
        """Forget a storage with its blocks; open sessions that write there are over."""
        del self.storages[name]
        for write in [w for w in self.open_writes.values() if w.place.storage == name]:
            self._decide(write, bytes(len(write.keys)))
        for instance in list(self.instances.values()):
            await self.remove_in_turns([at for at in self.served(instance) if at.write.place.storage == name])
        # Last, so that a restart in the middle finds the storage still there; it may have been added again by now.
        if name not in self.storages:
            self.changes.remove_storage(name)

    def served(self, instance: Instance) -> list[Location]:
        """All blocks of an instance that readers see."""
        return [location for found in instance.by_key.values() for location in found if location.is_serving]

    def tick(self) -> None:
        """Time has passed: open sessions end, groups that are too full are reclaimed, files are deleted."""
        now = self._clock()
        while self._ending and self._ending[0][0] <= now:
            write = self.writes.get(heapq.heappop(self._ending)[1])
            if write is not None and write.is_open:
                self._decide(write, bytes(len(write.keys)))
        for group in self.groups.values():
            self._reclaimer.turn(group)
        if self._has_more_to_delete and self.files.has_room:
            self._queue_deletions()
        self.files.tick(list(self.storages.values()))
        over = [write for write in self._empty.values() if write.ends_at <= now]
        if over:
            for write in over:
                del self._empty[write.session_id], self.writes[write.session_id]
            self.changes.remove_writes(over)

    def add_defaults(self, file_root: str) -> None:
        """What there is when nothing was ever registered."""
        if self.storages or self.groups:
            return
        storage, group = default_storage(file_root), default_group()
        self.storages[storage.name], self.groups[group.name] = storage, group
        self.changes.set_storage(storage)
        self.changes.set_group(group)

    def _restore(self, write: Write) -> None:
        instance = self.instances.get(write.instance_id)
        if instance is not None:
            self._enter(write, instance)
        if write.is_open:
            self._open(write)
        elif not any(write.status):
            self._empty[write.session_id] = write
        if State.DELETING in write.status:
            for chunk in sorted({write.chunk_of(i) for i, state in enumerate(write.status) if state == State.DELETING}):
                self._delete_if_unused((write, chunk))

    def _open(self, write: Write) -> None:
        heapq.heappush(self._ending, (write.ends_at, write.session_id))
        self.open_writes[write.session_id] = write

    def _enter(self, write: Write, instance: Instance) -> None:
        by_key, num_keys, size_bytes = instance.by_key, 0, 0
        for location, key, state, layout in zip(
            write.locations, write.keys, write.status, write.layout_of, strict=True
        ):
            if state in (State.WRITING, State.SERVING):
                by_key.setdefault(key, []).append(location)
                num_keys += 1
                size_bytes += write.sizes[layout]
        self._usage.setdefault(write.place.storage, Usage()).count(num_keys, size_bytes)
        if (group := self.groups.get(write.group)) is not None:
            group.count(write.place.type, num_keys, size_bytes)
            group.ranking.enter([location for location in write.locations if location.is_serving], instance.block_size)

    def _leave(self, location: Location, state: State) -> None:
        write = location.write
        write.status[location.position] = state
        instance, group = self.instances.get(write.instance_id), self.groups.get(write.group)
        if instance is not None:
            found = instance.by_key.get(location.key, [])
            if location in found:
                found.remove(location)
                if not found:
                    del instance.by_key[location.key]
        self.usage_of(write.place.storage).count(-1, -location.size_bytes)
        if group is not None:
            group.count(write.place.type, -1, -location.size_bytes)
            group.ranking.leave(location)

    def _decide(self, write: Write, success: bytes) -> None:
        write.success = success
        write.ends_at = self._clock() + FINISHED_KEPT_S
        self.open_writes.pop(write.session_id, None)
        status = bytes(State.SERVING if done else State.DELETING for done in success)
        self.changes.end_write(write, status, FINISHED_KEPT_S)
        self.changes.when_written().add_done_callback(lambda _: self._decided(write, success))

    def _decided(self, write: Write, success: bytes) -> None:
        """It is in the database."""
        instance, group = self.instances.get(write.instance_id), self.groups.get(write.group)
        served: list[Location] = []
        for location, done in zip(write.locations, success, strict=True):
            if done:
                write.status[location.position] = State.SERVING
                served.append(location)
            else:
                self._leave(location, State.DELETING)
        if group is not None and instance is not None:
            group.ranking.enter(served, instance.block_size)
        if write.place.storage not in self.storages:
            self.remove(served)
        # The instance may have been removed meanwhile, and registered again.
        self.remove([s for s in served if instance is None or s not in instance.by_key.get(s.key, ())])
        for chunk in sorted({write.chunk_of(i) for i, state in enumerate(write.status) if state == State.DELETING}):
            self._delete_if_unused((write, chunk))
        if not any(write.status):
            self._empty[write.session_id] = write

    def _delete_when_written(self, chunks: list[Chunk]) -> None:
        def delete(_: object) -> None:
            for chunk in chunks:
                self._delete_if_unused(chunk)

        self.changes.when_written().add_done_callback(delete)

    def _delete_if_unused(self, chunk: Chunk) -> None:
        states = chunk[0].chunk_states(chunk[1])
        if State.DELETING in states and State.WRITING not in states and State.SERVING not in states:
            group = self.groups.get(chunk[0].group)
            delay_ms = group.config.cache_config.reclaim_strategy.delay_before_delete_ms if group is not None else 0
            self._has_more_to_delete |= not self.files.delete(chunk, delay_ms / 1000)

    def _queue_deletions(self) -> None:
        """Find chunks again for which there was no room; those that wait already are passed over."""
        self._has_more_to_delete = False
        for write in self.writes.values():
            if State.DELETING in write.status:
                for chunk in sorted({write.chunk_of(i) for i, s in enumerate(write.status) if s == State.DELETING}):
                    if not self.files.is_waiting((write, chunk)):
                        self._delete_if_unused((write, chunk))

    def _files_deleted(self, chunks: list[Chunk]) -> None:
        for write, chunk in chunks:
            first = chunk * write.place.keys_per_file
            for position in range(first, min(first + write.place.keys_per_file, len(write.keys))):
                write.status[position] = State.GONE
            if not any(write.status) and write.session_id in self.writes:
                self._empty[write.session_id] = write


def _split(
    instance: Instance, wanted: Sequence[tuple[int, Layout]], min_replicas: int
) -> tuple[list[bool], list[tuple[int, Layout]]]:
    held: list[bool] = []
    new: dict[tuple[int, Layout], None] = {}
    for key, layout in wanted:
        names = frozenset(name for name, _ in layout)
        copies = sum(location.covers(names) for location in instance.by_key.get(key, ()))
        is_held = copies >= min_replicas or (key, layout) in new
        held.append(is_held)
        if not is_held:
            new[key, layout] = None
    return held, list(new)
