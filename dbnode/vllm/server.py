"""One vLLM server as the DB node knows it: who it is, how busy, what is wrong with it. Owned by `dbnode.vllm.client`. No I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from dbnode.errors import WorkerUnreachable
from dbnode.vllm.metrics import VllmMetrics, VllmRates, load_of
from dbnode.vllm.wire import ModelCard
from dbnode.worker_messages import Engine, WorkerFacts
from stratakv.keys import NAMESPACE_BYTES
from stratakv.wire import WorkerLoad
from stratakv.worker_address import VllmAddress


@dataclass(slots=True)
class VllmServer:
    """Changed by its client only."""

    address: VllmAddress
    facts: WorkerFacts | None = None
    model: str = ""
    """What it calls the model."""
    load: WorkerLoad = WorkerLoad()
    num_waiting: int = 0
    """Requests of this DB node that have no token yet."""
    _rates: VllmRates = field(default_factory=VllmRates)
    _started: str = ""

    @property
    def http_url(self) -> str:
        return f"http://{self.address.place}"

    def is_known(self, metrics: VllmMetrics) -> bool:
        """Whether the process that answers is the one that was registered."""
        return self.facts is not None and self._started == metrics.started

    def take(self, metrics: VllmMetrics) -> None:
        """A newer reading of its metrics."""
        self._rates.take(metrics)
        self.load = load_of(metrics, self._rates, self.num_waiting)

    def register(self, served_model: str, cards: Sequence[ModelCard], metrics: VllmMetrics) -> None:
        """Work out who it is. Raises WorkerUnreachable that says what does not fit."""
        address = self.address
        card = self._card(served_model, cards)
        block_size = metrics.config_number("block_size")
        if address.block_size and block_size and address.block_size != block_size:
            raise WorkerUnreachable(f"{address.url} has blocks of {block_size} tokens, not {address.block_size}")
        block_size = block_size or address.block_size
        if not block_size or not card.max_model_len:
            raise WorkerUnreachable(f"{address.url} does not tell its block size: add block_size=… to its address")
        identity = hashlib.sha256(f"{address.url} {metrics.started}".encode()).hexdigest()
        self.model, self._started, self._rates = card.id, metrics.started, VllmRates()
        self.facts = WorkerFacts(
            worker=address.place,
            epoch=identity,
            role=address.role,
            model=served_model,
            # Without a namespace nobody else can read its blocks, which a namespace of its own says.
            namespace=address.namespace or identity[: 2 * NAMESPACE_BYTES],
            block_size=block_size,
            max_model_len=card.max_model_len,
            dtype=metrics.config.get("cache_dtype", "auto"),
            engine=Engine.VLLM,
            is_pooled=bool(address.namespace),
            events=address.events,
            replay=address.replay,
            hash_algorithm=metrics.config.get("prefix_caching_hash_algo", ""),
        )

    def introduced(self, namespace: str) -> None:
        """Its connector tells which blocks it writes."""
        assert self.facts is not None
        self.facts = msgspec.structs.replace(self.facts, namespace=namespace, is_pooled=True)

    def _card(self, served_model: str, cards: Sequence[ModelCard]) -> ModelCard:
        base = [card for card in cards if card.parent is None]
        wanted = self.address.model or served_model
        found = [card for card in base if card.id == wanted]
        if not found and not self.address.model and len(base) == 1:
            found = base
        if not found:
            names = ", ".join(card.id for card in cards) or "none"
            raise WorkerUnreachable(f"{self.address.url} does not serve {wanted!r}; its models: {names}")
        return found[0]
