"""Engines over tiny random models, a lower tier in memory, and the greedy oracle by transformers."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PretrainedConfig

from stratakv.keys import BlockKey, block_keys
from workers.engine import (
    Engine,
    EngineConfig,
    EngineDtype,
    EngineEvent,
    EngineRequest,
    FinishedEvent,
    SamplingParams,
    TokenEvent,
)
from workers.engine.connector import ExternalHit, KVConnector, KVLoadError, OnFound, Tier
from workers.engine.kv_cache import KVCache

VOCAB_SIZE = 160
TIMEOUT_S = 60.0
TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 2,
}


def save_tiny(directory: Path, config: PretrainedConfig | None = None, seed: int = 0) -> Path:
    """A random model with the shape of `config` (a tiny Llama by default), as a Hugging Face directory."""
    torch.manual_seed(seed)
    config = config or LlamaConfig(**TINY)
    model = LlamaForCausalLM(config) if isinstance(config, LlamaConfig) else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)  # transformers starts biases at zero, which would hide a missing one
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.float().save_pretrained(directory)
    return directory


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


class Oracle:
    """Greedy continuation by transformers, fp32, eager attention."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")

    @torch.inference_mode()
    def greedy(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Without a stop at eos."""
        inputs = torch.tensor([list(token_ids)])
        out = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=None,
        )
        return out[0, len(token_ids) :].tolist()


@dataclass
class Listener:
    """Collects one request's events."""

    events: queue.Queue[EngineEvent] = field(default_factory=queue.Queue)

    def result(self) -> tuple[list[int], FinishedEvent]:
        """All output tokens and the terminal event."""
        tokens: list[int] = []
        while True:
            event = self.events.get(timeout=TIMEOUT_S)
            if isinstance(event, FinishedEvent):
                assert self.events.empty(), "nothing may follow the terminal event"
                return tokens, event
            tokens.append(event.token_id)

    def wait_first(self) -> TokenEvent:
        event = self.events.get(timeout=TIMEOUT_S)
        assert isinstance(event, TokenEvent), event
        return event


def request(
    token_ids: Sequence[int],
    num_tokens: int,
    *,
    request_id: str = "r",
    block_size: int = 16,
    resume: Sequence[int] = (),
    external: ExternalHit | None = None,
    deadline: float | None = None,
    **sampling: Any,
) -> EngineRequest:
    """Greedy and without stop at eos unless told otherwise."""
    params = SamplingParams(**{"max_tokens": num_tokens, "temperature": 0.0, "ignore_eos": True, **sampling})
    keys = block_keys([*token_ids, *resume], block_size)
    return EngineRequest(request_id, list(token_ids), params, keys, list(resume), external, deadline)


def submit(engine: Engine, what: EngineRequest) -> Listener:
    listener = Listener()
    engine.submit(what, listener.events.put)
    return listener


def generate(engine: Engine, token_ids: Sequence[int], num_tokens: int, **how: Any) -> tuple[list[int], FinishedEvent]:
    how = {"block_size": engine.config.block_size, **how}
    return submit(engine, request(token_ids, num_tokens, **how)).result()


def fp32(directory: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(directory, **{"dtype": EngineDtype.FP32, "device": "cpu", "num_blocks": 64, **settings})


@contextmanager
def running(
    config: EngineConfig, connector: Callable[[KVCache], KVConnector] | None = None, **parts: Any
) -> Iterator[Engine]:
    """A started engine; at the end its books must be whole and no block may be held any more."""
    engine = Engine(config, **parts)
    engine.attach(connector(engine.kv_cache) if connector else None)
    engine.start()
    try:
        yield engine
    finally:
        engine.shutdown()
    if engine.failure is None:
        engine.kv_cache.check()


@dataclass
class MemoryTier:
    """A lower tier: pages in a dictionary, loads by a thread, one layer after the other."""

    cache: KVCache
    pages: dict[BlockKey, list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=dict)
    num_aborted: int = 0
    num_finished: int = 0
    fault: dict[str, int] = field(default_factory=dict)
    """Of what is found for preempted requests."""
    hits: list[MemoryHit] = field(default_factory=list)
    """Found for preempted requests."""
    owners: dict[BlockKey, int] = field(default_factory=dict)

    def find(self, keys: Sequence[BlockKey], num_l1_blocks: int, on_found: OnFound) -> None:
        self.hits.append(self.hit(keys, num_l1_blocks, **self.fault))
        on_found(self.hits[-1])

    def save(
        self, keys: Sequence[BlockKey], l1_blocks: Sequence[int], owner: int, on_finished: Callable[[], None]
    ) -> MemorySave:
        self.owners.update(dict.fromkeys(keys, owner))
        return MemorySave(self, list(keys), list(l1_blocks), on_finished)

    def hit(self, keys: Sequence[BlockKey], start_block: int, **fault: int) -> MemoryHit:
        held = []
        for key in keys[start_block:]:
            if key not in self.pages:
                break
            held.append(key)
        return MemoryHit(self, start_block, held, **fault)


@dataclass
class MemorySave:
    tier: MemoryTier
    keys: list[BlockKey]
    blocks: list[int]
    on_finished: Callable[[], None]
    layers: list[list[tuple[torch.Tensor, torch.Tensor]]] = field(default_factory=list)

    def layer_done(self, layer: int) -> None:
        assert layer == len(self.layers), "layers are finished in order"
        k, v = self.tier.cache.k[layer], self.tier.cache.v[layer]
        self.layers.append([(k[block].clone(), v[block].clone()) for block in self.blocks])
        if len(self.layers) == len(self.tier.cache.k):
            for index, key in enumerate(self.keys):
                self.tier.pages[key] = [blocks[index] for blocks in self.layers]
            self.tier.num_finished += 1
            self.on_finished()

    def abort(self) -> None:
        assert len(self.layers) < len(self.tier.cache.k), "an aborted job has never been told of all layers"
        self.tier.num_aborted += 1
        self.on_finished()


@dataclass
class MemoryHit:
    tier: MemoryTier
    start_block: int
    keys: list[BlockKey]
    fail_layer: int = -1
    num_good_blocks: int = 0
    num_released: int = 0
    num_ahead: int = 0
    """Of the loads, those begun before the request's turn."""
    loads: list[MemoryLoad] = field(default_factory=list)

    @property
    def tiers(self) -> list[Tier]:
        return [Tier.POOL] * len(self.keys)

    def load_ahead(self, first_block: int, l1_blocks: Sequence[int]) -> MemoryLoad:
        self.num_ahead += 1
        return self.load(first_block, l1_blocks)

    def load(self, first_block: int, l1_blocks: Sequence[int]) -> MemoryLoad:
        assert self.num_released == 0, "a released hit is not loaded"
        first = first_block - self.start_block
        self.loads.append(MemoryLoad(self, self.keys[first : first + len(l1_blocks)], list(l1_blocks)))
        return self.loads[-1]

    def release(self) -> None:
        self.num_released += 1


class MemoryLoad:
    def __init__(self, hit: MemoryHit, keys: list[BlockKey], blocks: list[int]) -> None:
        self.hit, self.keys, self.blocks = hit, keys, blocks
        self.waited: list[int] = []
        self.cancelled = False
        self._arrived = [threading.Event() for _ in hit.tier.cache.k]
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()

    def _copy(self) -> None:
        cache = self.hit.tier.cache
        for layer, arrived in enumerate(self._arrived):
            for index, (key, block) in enumerate(zip(self.keys, self.blocks, strict=True)):
                k, v = self.hit.tier.pages[key][layer]
                bad = layer == self.hit.fail_layer and index >= self.hit.num_good_blocks
                cache.k[layer][block] = float("nan") if bad else k
                cache.v[layer][block] = float("nan") if bad else v
            arrived.set()

    def wait_layer(self, layer: int) -> None:
        assert self._arrived[layer].wait(TIMEOUT_S)
        self.waited.append(layer)
        if layer == self.hit.fail_layer:
            raise KVLoadError("damaged on the way", self.hit.num_good_blocks)

    def join(self) -> None:
        """Until all of it is there."""
        self._thread.join(TIMEOUT_S)

    def cancel(self) -> None:
        self.join()
        self.cancelled = True
