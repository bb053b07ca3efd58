"""One write session and what it wrote: its blocks, their state, and the URI of each part. Values and arithmetic only.

A session says for itself where its bytes lie (`Place`) and how a block is laid out (`Layout`), so that neither a storage that
is changed nor an instance that is removed makes what was written before unreachable, or impossible to delete.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import quote

import msgspec

from meta_server.kvcm.protocol import meta_service_pb2 as meta

Layout = tuple[tuple[str, int], ...]
"""The specs of a block: name and bytes of each."""


class State(enum.IntEnum):
    """Of one block of a session; the numbers are those of the API."""

    GONE = 0
    WRITING = 2
    SERVING = 3
    DELETING = 4


class Place(msgspec.Struct, frozen=True):
    """Where a session's files are."""

    storage: str
    type: int
    """Of the API's StorageType."""
    scheme: str
    root: str
    keys_per_file: int
    options: tuple[tuple[str, str], ...] = ()
    """What else is needed to reach it."""


@dataclass(slots=True, eq=False)
class Write:
    """One session, from its start until nothing of it is left."""

    session_id: str
    instance_id: str
    group: str
    place: Place
    layouts: tuple[Layout, ...]
    layout_of: bytes
    """Per block, the position of its layout in `layouts`."""
    keys: tuple[int, ...]
    status: bytearray
    """Per block, a State."""
    created_s: int
    """Unix time."""
    ends_at: float
    """On the process's clock: when an open session is given back, when a finished one without blocks is forgotten."""
    success: bytes | None = None
    """What FinishWriteCache said, one byte a block; None while open."""
    sizes: tuple[int, ...] = field(init=False)
    """Bytes of a block of each layout."""
    locations: tuple[Location, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = tuple(sum(size for _, size in layout) for layout in self.layouts)
        self.locations = tuple(Location(self, i) for i in range(len(self.keys)))

    @property
    def is_open(self) -> bool:
        return self.success is None

    def names(self, chunk: int) -> list[str]:
        """The files, or objects, of `keys_per_file` consecutive blocks, below the instance's directory."""
        first = chunk * self.place.keys_per_file
        used = {self.layout_of[i] for i in range(first, min(first + self.place.keys_per_file, len(self.keys)))}
        specs = {name for layout in used for name, _ in self.layouts[layout]}
        return [self._name(chunk, spec) for spec in sorted(specs)]

    def chunk_of(self, position: int) -> int:
        return position // self.place.keys_per_file

    def chunk_states(self, chunk: int) -> bytearray:
        first = chunk * self.place.keys_per_file
        return self.status[first : first + self.place.keys_per_file]

    def _name(self, chunk: int, spec: str) -> str:
        return f"{self.session_id}-{chunk}.{quote(spec, safe='')}"

    def specs(self, position: int) -> Iterator[tuple[str, str]]:
        """Name and URI of each part of a block."""
        chunk, within = divmod(position, self.place.keys_per_file)
        for name, size_bytes in self.layouts[self.layout_of[position]]:
            if self.place.scheme == "mooncake":
                bucket = quote(self.place.storage, safe="")
                key = f"{instance_directory_name(self.instance_id)}/{self._name(chunk, name)}"
                yield name, f"mooncake://{bucket}/{key}"
            else:
                path = quote(f"{instance_directory(self.place, self.instance_id)}/{self._name(chunk, name)}")
                yield name, f"{self.place.scheme}://{path}?offset={within * size_bytes}&size={size_bytes}"


@dataclass(slots=True, eq=False)
class Location:
    """One block of one session, and how warm it is."""

    write: Write
    position: int
    rank: float = 0.0
    """By the group's policy; the lowest goes first. These five are `ranking`'s to change."""
    tick: int = 0
    """When it was last asked for; decides between equal ranks."""
    reads: int = 0
    is_ranked: bool = False
    """Served, and not chosen to go."""
    pinned_until: float = 0.0
    """On the process's clock."""

    @property
    def key(self) -> int:
        return self.write.keys[self.position]

    @property
    def state(self) -> State:
        return State(self.write.status[self.position])

    @property
    def is_serving(self) -> bool:
        return self.write.status[self.position] == State.SERVING

    @property
    def layout(self) -> Layout:
        return self.write.layouts[self.write.layout_of[self.position]]

    @property
    def size_bytes(self) -> int:
        return self.write.sizes[self.write.layout_of[self.position]]

    def covers(self, names: frozenset[str]) -> bool:
        """Whether every one of these specs is there; without names, any location does."""
        return not names or names <= {name for name, _ in self.layout}

    def message(self, names: frozenset[str] = frozenset()) -> meta.CacheLocation:
        """As clients see it, with those specs only if names are given."""
        specs = [
            meta.LocationSpec(name=name, uri=uri)
            for name, uri in self.write.specs(self.position)
            if not names or name in names
        ]
        kind = meta.StorageType.Name(self.write.place.type)
        return meta.CacheLocation(type=kind, spec_size=len(specs), location_specs=specs)


def instance_directory_name(instance_id: str) -> str:
    """Of the directory, within its storage."""
    # An id may be a dot or two, which quoting leaves as they are.
    return f"i-{quote(instance_id, safe='')}"


def instance_directory(place: Place, instance_id: str) -> str:
    """Where an instance's files are."""
    return f"{place.root}/{instance_directory_name(instance_id)}"
