"""One of SGLang's pools, joined to its pages in the memory pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stratakv.errors import InvalidRequest
from stratakv.integrations.page_store import PageStore
from stratakv.integrations.sglang import metrics
from stratakv.integrations.sglang.host_pages import HostPages
from stratakv.integrations.sglang.metrics import Transfers
from stratakv.integrations.sglang.scope import page_key


@dataclass(frozen=True, slots=True)
class PoolPages:
    """All methods may raise StrataError; keys are SGLang's."""

    name: str
    pages: HostPages
    store: PageStore
    loads: Transfers
    saves: Transfers

    @property
    def page_bytes(self) -> int:
        return self.pages.layout.data_bytes

    def count(self, keys: Sequence[str]) -> int:
        """How many leading pages can be found."""
        found = self.store.count([page_key(key) for key in keys])
        metrics.looked_up(self.name, len(keys), found)
        return found

    def present(self, keys: Sequence[str]) -> list[bool]:
        """Which pages can be found."""
        found = self.store.present([page_key(key) for key in keys])
        metrics.looked_up(self.name, len(keys), sum(found))
        return found

    def load(self, keys: Sequence[str], host_indices: torch.Tensor) -> list[bool]:
        """Into these slots of the host pool; which pages arrived whole. Slots of others hold anything."""
        window = self.pages.open(host_indices, to_store=False)
        self._check(keys, len(window.memory.rows))
        with self.loads.timed(len(keys), self.page_bytes):
            loaded = self.store.load([page_key(key) for key in keys], window.memory)
            window.publish(loaded)
        metrics.loaded(self.name, loaded)
        return loaded

    def put(self, keys: Sequence[str], host_indices: torch.Tensor) -> list[bool]:
        """From these slots of the host pool; which pages can be found now."""
        window = self.pages.open(host_indices, to_store=True)
        self._check(keys, len(window.memory.rows))
        with self.saves.timed(len(keys), self.page_bytes):
            stored = self.store.put([page_key(key) for key in keys], window.memory)
        metrics.stored(self.name, stored)
        return stored

    def load_flat(self, keys: Sequence[str], targets: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """Into tensors of a whole page each; the tensor, or None for a page that did not arrive."""
        buffer = torch.empty((len(keys), self.page_bytes), dtype=torch.uint8)
        self._check(keys, len(targets))
        loaded = self.store.load([page_key(key) for key in keys], self.pages.flat(buffer))
        metrics.loaded(self.name, loaded)
        for row, target in enumerate(targets):
            if loaded[row]:
                target.copy_(buffer[row].view(target.dtype).reshape(target.shape))
        return [target if ok else None for target, ok in zip(targets, loaded, strict=True)]

    def put_flat(self, keys: Sequence[str], values: Sequence[torch.Tensor]) -> list[bool]:
        """From tensors of a whole page each."""
        self._check(keys, len(values))
        buffer = torch.empty((len(keys), self.page_bytes), dtype=torch.uint8)
        for row, value in enumerate(values):
            flat = value.detach().cpu().contiguous().view(torch.uint8).reshape(-1)
            if flat.numel() != self.page_bytes:
                raise InvalidRequest(f"a page of {self.name} has {self.page_bytes} bytes, not {flat.numel()}")
            buffer[row] = flat
        stored = self.store.put([page_key(key) for key in keys], self.pages.flat(buffer))
        metrics.stored(self.name, stored)
        return stored

    def _check(self, keys: Sequence[str], num_pages: int) -> None:
        if len(keys) != num_pages:
            raise InvalidRequest(f"{len(keys)} keys for {num_pages} pages of {self.name}")
