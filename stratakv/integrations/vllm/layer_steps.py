"""How far the layers of one group have come in the step that runs: its saves wait for them."""

from __future__ import annotations

from dataclasses import dataclass, field

from stratakv.integrations.vllm.group_pages import GroupPages
from stratakv.integrations.vllm.orders import SaveOrder
from stratakv.integrations.vllm.saves import BlockSave
from stratakv.integrations.vllm.windows import CudaStamps, Stamps


@dataclass(slots=True)
class LayerSteps:
    """One group; used by vLLM's thread."""

    pages: GroupPages
    saves: list[BlockSave] = field(default_factory=list)
    """Of this step."""
    _stamps: Stamps | None = None
    _final: set[int] = field(default_factory=set)
    _num_leading: int = 0

    @property
    def num_layers(self) -> int:
        return len(self.pages.layers)

    def begin(self) -> None:
        """A step, of which nothing is computed yet."""
        self._final.clear()
        self._num_leading = 0
        self._stamps = None

    def save_of(self, order: SaveOrder) -> BlockSave:
        """Make a save that reads no layer before it is final."""
        if self._stamps is None and self.pages.is_cuda:
            self._stamps = CudaStamps(self.num_layers)
        return BlockSave(order, self.pages, self._stamps)

    def is_final(self, layer: int) -> None:
        """vLLM has written it."""
        if not self.saves:
            return
        if self._stamps is not None:
            self._stamps.mark(layer)
        self._final.add(layer)
        while self._num_leading in self._final:
            self._num_leading += 1
        # The last one opens when the step is over.
        if self._num_leading < self.num_layers:
            for save in self.saves:
                save.ready.open(self._num_leading)

    def end(self) -> None:
        """The forward pass is over, if there was one: all layers are final."""
        if self.saves and self._stamps is not None:
            for layer in set(range(self.num_layers)) - self._final:
                self._stamps.mark(layer)
        for save in self.saves:
            if not save.is_void:
                save.ready.open(self.num_layers)
        self.saves.clear()
