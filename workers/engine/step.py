"""One step: start loads and write-downs, run the forward with both in step with its layers, settle what came of each part.

Harm stays in its sequence: rows of a step meet in products only, never each other, so a load that fails or a value that is
not finite spoils its own part, and the other parts are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from stratakv.errors import StrataError
from stratakv.log import EventLogger
from workers.engine.attention_parts import AttentionPart
from workers.engine.block_table import Run
from workers.engine.connector import KVConnector, KVLoadError, LoadJob, SaveJob
from workers.engine.forward_batch import ForwardBatch
from workers.engine.kv_cache import KVCache
from workers.engine.model import Model
from workers.engine.requests import SamplingParams
from workers.engine.sampler import Sample, SampleRow, sample
from workers.engine.scheduler import StepPart
from workers.engine.structured import Structure

_log = EventLogger(__name__)
_CHECK_ONLY = SampleRow(SamplingParams(max_tokens=1, temperature=0.0), seed=0, index=0)
"""For parts that end before their sequence does: the row is only looked at for NaN."""

_Allowed = torch.Tensor | StrataError | None
"""Tokens to choose from (None: all), or why that cannot be told."""
ReleaseBlocks = Callable[[Sequence[int]], None]


@dataclass(slots=True, eq=False)
class PartOutcome:
    """What a step did for one part: a sample (to be used if the part samples), or a failed load, or neither: not finite.

    With a `structure_error` the sample is of no use.
    """

    part: StepPart
    sample: Sample | None = None
    load_error: KVLoadError | None = None
    structure_error: StrataError | None = None


@dataclass(slots=True, eq=False)
class _Transfers:
    """A part's load and write-down while the step runs."""

    part: StepPart
    load: LoadJob | None = None
    save: SaveJob | None = None
    load_error: KVLoadError | None = field(default=None)

    def wait_layer(self, layer: int) -> None:
        if self.load is None or self.load_error is not None:
            return
        try:
            self.load.wait_layer(layer)
        except KVLoadError as error:
            self.fail_load(error)

    def fail_load(self, error: KVLoadError) -> None:
        self.load_error = error
        if self.load is not None:
            self.load.cancel()
        self.abort_save()

    def layer_done(self, layer: int) -> None:
        if self.save is not None:
            self.save.layer_done(layer)

    def abort_save(self) -> None:
        save, self.save = self.save, None
        if save is not None:
            save.abort()

    def abandon(self) -> None:
        """The step died: stop both, whatever each of them says to it."""
        with suppress(StrataError):
            self.abort_save()
        if self.load is not None and self.load_error is None:
            with suppress(StrataError):
                self.load.cancel()


class _Hooks:
    """Keeps the transfers in step with the layers. The last layer is released to write-downs only after the NaN check."""

    def __init__(self, transfers: Sequence[_Transfers], num_layers: int) -> None:
        self._loading = [t for t in transfers if t.load is not None]
        self._saving = [t for t in transfers if t.save is not None]
        self._last = num_layers - 1

    @property
    def is_idle(self) -> bool:
        return not self._loading and not self._saving

    def before_attention(self, layer: int) -> None:
        for transfers in self._loading:
            transfers.wait_layer(layer)

    def after_write(self, layer: int) -> None:
        if layer < self._last:
            for transfers in self._saving:
                transfers.layer_done(layer)


class StepRunner:
    """Runs the steps of one engine, on its thread. `release` is called from any thread when a write-down needs L1 no more."""

    def __init__(self, model: Model, cache: KVCache, connector: KVConnector | None, release: ReleaseBlocks) -> None:
        self._model = model
        self._cache = cache
        self._connector = connector
        self._release = release
        self._last_layer = model.facts.num_layers - 1
        self._masks = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def run(self, parts: Sequence[StepPart]) -> list[PartOutcome]:
        """Compute `parts`; one outcome for each. Raises only if the whole step is lost."""
        all_transfers: list[_Transfers] = []
        masks = [self._begin_mask(part) for part in parts]
        try:
            for part in parts:
                all_transfers.append(transfers := _Transfers(part))
                self._begin(transfers)
            hooks = _Hooks(all_transfers, self._last_layer + 1)
            logits = self._model.forward(self._batch(parts), self._cache, hooks)
            allowed = [None if mask is None else mask.result() for mask in masks]
            samples = sample(logits, [_sample_row(*row) for row in zip(parts, allowed, strict=True)])
            return [self._settle(*row) for row in zip(all_transfers, samples, allowed, strict=True)]
        except BaseException:
            for transfers in all_transfers:
                transfers.abandon()
            raise

    def close(self) -> None:
        """No more steps."""
        self._masks.shutdown(wait=False, cancel_futures=True)

    def _begin_mask(self, part: StepPart) -> Future[_Allowed] | None:
        """Which tokens the part may choose from, computed while the model runs."""
        structure = part.sequence.request.structure
        return self._masks.submit(_allowed, structure) if structure is not None and part.samples else None

    def _begin(self, transfers: _Transfers) -> None:
        part = transfers.part
        sequence, block_size = part.sequence, self._cache.block_size
        first_filled, stop_filled = sequence.num_computed // block_size, part.stop // block_size
        if part.load_job is not None:
            transfers.load = part.load_job
        elif part.load_first_block is not None and sequence.external is not None:
            blocks = sequence.table.blocks[part.load_first_block : first_filled]
            try:
                transfers.load = sequence.external.load(part.load_first_block, blocks)
            except StrataError as error:
                transfers.fail_load(error if isinstance(error, KVLoadError) else KVLoadError(error.message, 0))
        if self._connector is None or first_filled == stop_filled or transfers.load_error is not None:
            return
        self._begin_save(transfers, self._connector, first_filled, stop_filled)

    def _begin_save(self, transfers: _Transfers, connector: KVConnector, first: int, stop: int) -> None:
        sequence = transfers.part.sequence
        keys, blocks = sequence.keys[first:stop], sequence.table.blocks[first:stop]
        self._cache.reference(blocks)
        try:
            transfers.save = connector.save(keys, blocks, sequence.request.owner, lambda: self._release(blocks))
        except StrataError as error:
            _log.debug("save_refused", reason=error.code, num_blocks=len(blocks))
        if transfers.save is None:
            self._cache.release(blocks)

    def _batch(self, parts: Sequence[StepPart]) -> ForwardBatch:
        token_ids: list[int] = []
        positions: list[int] = []
        writes: list[Run] = []
        attention: list[AttentionPart] = []
        for part in parts:
            sequence, start, stop = part.sequence, part.sequence.num_computed, part.stop
            slots = sequence.table.slot_runs(0, stop)
            attention.append(AttentionPart(len(token_ids), part.num_tokens, tuple(slots)))
            writes += sequence.table.slot_runs(start, stop)
            token_ids += sequence.token_ids[start:stop]
            positions += range(start, stop)
        return ForwardBatch(
            token_ids, positions, writes, attention, [part.first_row + part.num_rows - 1 for part in attention]
        )

    def _settle(self, transfers: _Transfers, sampled: Sample | None, allowed: _Allowed) -> PartOutcome:
        if transfers.load_error is not None:
            return PartOutcome(transfers.part, load_error=transfers.load_error)
        if sampled is None:
            transfers.abort_save()
            return PartOutcome(transfers.part)
        transfers.layer_done(self._last_layer)
        error = allowed if isinstance(allowed, StrataError) else None
        return PartOutcome(transfers.part, sampled, structure_error=error)


def _sample_row(part: StepPart, allowed: _Allowed) -> SampleRow:
    if not part.samples or isinstance(allowed, StrataError):
        return _CHECK_ONLY
    sequence = part.sequence
    return SampleRow(sequence.request.sampling, sequence.seed, sequence.output_index, allowed, sequence.penalties)


def _allowed(structure: Structure) -> _Allowed:
    try:
        return structure.allowed()
    except StrataError as error:
        return error
