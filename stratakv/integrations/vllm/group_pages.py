"""One rank's memory of one group of layers: its KV tensors, what pages of them are, and what reads and writes those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stratakv.integrations.vllm.kv_tensors import LayerTensor
from stratakv.integrations.vllm.orders import Rank
from stratakv.integrations.vllm.windows import OpenWindow, windows_of
from stratakv.keys import Namespace
from stratakv.layout import KVLayout
from stratakv.pool.pages import PageReader, PageWriter


@dataclass(frozen=True, slots=True)
class GroupPages:
    """A group."""

    layers: tuple[LayerTensor, ...]
    layout: KVLayout
    namespace: Namespace
    open_window: OpenWindow
    reader: PageReader
    writer: PageWriter

    @classmethod
    def of(cls, layers: tuple[LayerTensor, ...], layout: KVLayout, namespace: Namespace) -> GroupPages:
        """For the layers of one group."""
        reader, writer = PageReader(layout, namespace), PageWriter(layout, namespace)
        return cls(layers, layout, namespace, windows_of(layers), reader, writer)

    @property
    def is_cuda(self) -> bool:
        return self.layers[0].storage.device.type == "cuda"


@dataclass(frozen=True, slots=True)
class RankMemory:
    """All groups of a rank."""

    rank: Rank
    groups: Sequence[GroupPages]
    are_plain: bool
    """As `KVGroups` says it."""
