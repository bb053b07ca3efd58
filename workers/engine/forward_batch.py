"""What one step computes."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.attention_parts import AttentionPart
from workers.engine.block_table import Run


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """All tokens of a step, flattened: ids, positions and write places, by sequence; `logit_rows` want logits."""

    token_ids: list[int]
    positions: list[int]
    writes: list[Run]
    parts: list[AttentionPart]
    logit_rows: list[int]
