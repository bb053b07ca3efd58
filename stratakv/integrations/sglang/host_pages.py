"""Pages of one of SGLang's host pools as memory that the pool's transports read and write in place.

A pool says where the ranges of a page lie (`get_page_buffer_meta`). That is asked of three pages at the start: if every range
moves on by a fixed stride, and lies in a tensor of the pool, the pages are moved in place. Pools that answer otherwise are
copied page by page through a buffer (`get_data_page`, `set_from_flat_data_page`). Knows SGLang's pools by these methods only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from stratakv._native.base import Int64s
from stratakv.errors import InvalidRequest
from stratakv.layout import LAYERS_MAX, KVLayout, LayerSpec, RangeSpec
from stratakv.pool.pages import PageMemory, RangeMemory


class PageWindow(Protocol):
    """Some pages of a host pool."""

    @property
    def memory(self) -> PageMemory:
        """Where the pages lie, in their order."""

    def publish(self, loaded: Sequence[bool]) -> None:
        """After the memory was filled: make the pages that were loaded the pool's."""


class HostPages(Protocol):
    """The pages of one host pool."""

    @property
    def layout(self) -> KVLayout: ...

    def open(self, host_indices: torch.Tensor, *, to_store: bool) -> PageWindow:
        """The pages of these slots, whole and in order; with their bytes if they are to be stored. Raises InvalidRequest."""

    def flat(self, buffer: torch.Tensor) -> PageMemory:
        """Rows of a contiguous [pages, bytes of a page] tensor of uint8, each a page as the pool's `get_data_page` gives it."""


def page_slots(pool: Any) -> int:
    """Slots in a page, as SGLang counts them in host indices."""
    return int(getattr(pool, "logical_page_size", 0) or pool.page_size or 1)


def host_pages(pool: Any, dtype: str, tp_rank: int, pp_rank: int) -> HostPages:
    """Pages in place where that is possible, else through a buffer."""
    return _direct_pages(pool, dtype, tp_rank, pp_rank) or CopiedPages(pool, dtype, tp_rank, pp_rank)


def page_starts(host_indices: torch.Tensor, slots: int) -> Int64s:
    """The first slot of each page. Raises InvalidRequest unless the slots are whole, aligned pages."""
    indices = host_indices.detach().cpu().numpy().astype(np.int64, copy=False).reshape(-1)
    if len(indices) % slots:
        raise InvalidRequest(f"{len(indices)} slots are no whole pages of {slots}")
    pages = indices.reshape(-1, slots)
    starts: Int64s = np.ascontiguousarray(pages[:, 0])
    if np.any(starts % slots) or not np.array_equal(pages, starts[:, None] + np.arange(slots)):
        raise InvalidRequest("slots of a page must be aligned and follow each other")
    return starts


@dataclass(frozen=True, slots=True)
class DirectWindow:
    """Pages in place."""

    memory: PageMemory

    def publish(self, loaded: Sequence[bool]) -> None:
        """The memory is the pool's."""


@dataclass(frozen=True, slots=True)
class DirectPages:
    """Pages of a pool whose memory the transports can use."""

    layout: KVLayout
    layers: Sequence[Sequence[RangeMemory]]
    slots: int
    num_pages: int

    def open(self, host_indices: torch.Tensor, *, to_store: bool) -> DirectWindow:
        rows = page_starts(host_indices, self.slots) // self.slots
        if len(rows) and (rows.min() < 0 or rows.max() >= self.num_pages):
            raise InvalidRequest(f"a page outside the {self.num_pages} of its pool")
        return DirectWindow(PageMemory(self.layers, rows))

    def flat(self, buffer: torch.Tensor) -> PageMemory:
        """The pool's layouts put all K before all V; only where each layer has a range of its own do ours alternate."""
        sizes = np.array([[part.size_bytes for part in layer.ranges] for layer in self.layout.layers])
        starts = np.concatenate(([0], np.cumsum(sizes.sum(axis=0))[:-1]))
        layers = []
        for layer in sizes:
            layers.append([RangeMemory(_bytes(buffer), int(start), buffer.shape[1]) for start in starts])
            starts = starts + layer
        return PageMemory(layers, np.arange(buffer.shape[0], dtype=np.int64))


class CopiedPages:
    """Pages of a pool that gives and takes them only as flat tensors."""

    def __init__(self, pool: Any, dtype: str, tp_rank: int, pp_rank: int) -> None:
        self._pool = pool
        self._slots = page_slots(pool)
        page = pool.get_dummy_flat_data_page()
        self._dtype = page.dtype
        self._page_bytes = page.numel() * page.element_size()
        name = f"{type(pool).__name__}:{pool.layout}:flat"
        ranges = (LayerSpec((RangeSpec(name, self._page_bytes),)),)
        self.layout = KVLayout(self._slots, dtype, ranges, tp_rank=tp_rank, pp_rank=pp_rank)

    def open(self, host_indices: torch.Tensor, *, to_store: bool) -> CopiedWindow:
        starts = page_starts(host_indices, self._slots).tolist()
        window = CopiedWindow(self._pool, starts, self._page_bytes, self._dtype)
        if to_store:
            window.fetch()
        return window

    def flat(self, buffer: torch.Tensor) -> PageMemory:
        return _flat_memory(buffer)


class CopiedWindow:
    """Copies of pages."""

    def __init__(self, pool: Any, starts: Sequence[int], page_bytes: int, dtype: torch.dtype) -> None:
        self._pool = pool
        self._starts = starts
        self._dtype = dtype
        self._buffer = torch.empty((len(starts), page_bytes), dtype=torch.uint8)
        self.memory = _flat_memory(self._buffer)

    def fetch(self) -> None:
        for row, start in enumerate(self._starts):
            page = self._pool.get_data_page(start, flat=True)
            self._buffer[row] = page.contiguous().view(torch.uint8).reshape(-1)

    def publish(self, loaded: Sequence[bool]) -> None:
        for row, start in enumerate(self._starts):
            if loaded[row]:
                self._pool.set_from_flat_data_page(start, self._buffer[row].view(self._dtype))


def _bytes(buffer: torch.Tensor) -> memoryview:
    return buffer.reshape(-1).numpy().data


def _flat_memory(buffer: torch.Tensor) -> PageMemory:
    """Each row a page of one layer with one range."""
    rows = np.arange(buffer.shape[0], dtype=np.int64)
    return PageMemory([[RangeMemory(_bytes(buffer), 0, buffer.shape[1])]], rows)


class _Range(NamedTuple):
    memory: RangeMemory
    size: int


def _direct_pages(pool: Any, dtype: str, tp_rank: int, pp_rank: int) -> DirectPages | None:
    """None for a pool whose pages cannot be moved in place."""
    slots = page_slots(pool)
    num_pages = int(getattr(pool, "logical_size", pool.size)) // slots
    ranges = _ranges(pool, slots, num_pages)
    if not ranges:
        return None
    by_layer = _by_layer(ranges, pool)
    if len(by_layer) > LAYERS_MAX:
        return None
    name = f"{type(pool).__name__}:{pool.layout}"
    specs = tuple(
        LayerSpec(tuple(RangeSpec(f"{name}:{n}", part.size) for n, part in enumerate(layer))) for layer in by_layer
    )
    layout = KVLayout(slots, dtype, specs, tp_rank=tp_rank, pp_rank=pp_rank)
    return DirectPages(layout, [[part.memory for part in layer] for layer in by_layer], slots, num_pages)


def _by_layer(ranges: Sequence[_Range], pool: Any) -> list[Sequence[_Range]]:
    """Ranges as the pool gives them: layer after layer where its layout has a range for each, else all in one."""
    num_layers = int(getattr(pool, "layer_num", 0) or 0)
    if pool.layout != "layer_first" or not num_layers or len(ranges) % num_layers:
        return [ranges]
    per_layer = len(ranges) // num_layers
    return [ranges[at : at + per_layer] for at in range(0, len(ranges), per_layer)]


def _ranges(pool: Any, slots: int, num_pages: int) -> list[_Range]:
    """Where the ranges of a page lie; none if pages are not at fixed strides, or somewhere else than in the pool's tensors."""
    if num_pages < 2:
        return []
    try:
        first, second, last = (_meta(pool, page, slots) for page in (0, 1, num_pages - 1))
    except (NotImplementedError, ValueError, AssertionError, AttributeError):
        return []  # how pools say that their layout has no such ranges
    if not first or len({len(first), len(second), len(last)}) != 1:
        return []
    storages = list(_storages(pool))
    ranges = []
    for (start, size), (next_start, next_size), (end, end_size) in zip(first, second, last, strict=True):
        stride = next_start - start
        memory = _containing(storages, start, end + size)
        is_regular = size == next_size == end_size and stride >= size and end == start + (num_pages - 1) * stride
        if not is_regular or memory is None:
            return []
        ranges.append(_Range(RangeMemory(_bytes(memory), start - memory.data_ptr(), stride), size))
    return ranges


def _meta(pool: Any, page: int, slots: int) -> list[tuple[int, int]]:
    """(address, size) of each range of one page."""
    meta = pool.get_page_buffer_meta(torch.arange(page * slots, (page + 1) * slots))
    return [] if meta is None else [(int(at), int(size)) for at, size in zip(*meta, strict=True)]


def _storages(pool: Any) -> Iterator[torch.Tensor]:
    """All bytes of each tensor of the pool that lies in host memory; they stay alive as long as these."""
    for value in vars(pool).values():
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage.nbytes():
                    yield torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))


def _containing(storages: Sequence[torch.Tensor], start: int, end: int) -> torch.Tensor | None:
    return next((s for s in storages if s.data_ptr() <= start and end <= s.data_ptr() + s.numel()), None)
