"""How long a prefix can be restored when several groups of layers have a say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from stratakv.integrations.vllm.groups import KVGroup, KVGroups, Reach
from stratakv.integrations.vllm.prefix_search import PrefixSearch

BLOCK = 4


def groups() -> st.SearchStrategy[KVGroups]:
    reaches = st.sampled_from([Reach.WINDOW, Reach.CHUNK])
    group = st.builds(KVGroup, reaches, st.sampled_from([BLOCK, 2 * BLOCK]), st.integers(1, 30))
    return st.lists(group, min_size=1, max_size=3).map(lambda made: KVGroups(tuple(made)))


def search(kinds: KVGroups, first_step: int) -> PrefixSearch:
    return PrefixSearch(cast(Any, None), {}, kinds, first_step, [], 1.0)


def can_go_on(kinds: KVGroups, first_step: int, present: Mapping[int, Sequence[bool]], steps: int) -> bool:
    """Token by token: whatever the next token reads is vLLM's own or present."""
    first, end = first_step * kinds.step_tokens, (first_step + steps) * kinds.step_tokens
    for n, group in enumerate(kinds.groups):
        begin = end - group.span + 1 if group.reach is Reach.WINDOW else end // group.span * group.span
        for token in range(max(begin, first), end):
            if not present[n][(token - first) // group.block_size]:
                return False
    return True


@given(groups(), st.integers(0, 3), st.integers(0, 5), st.data())
def test_the_longest_prefix_is_chosen_behind_which_every_token_can_be_read(
    kinds: KVGroups, first_step: int, num_steps: int, data: st.DataObject
) -> None:
    tokens = num_steps * kinds.step_tokens
    present = {
        n: data.draw(st.lists(st.booleans(), min_size=(size := tokens // group.block_size), max_size=size))
        for n, group in enumerate(kinds.groups)
    }
    possible = [steps for steps in range(1, num_steps + 1) if can_go_on(kinds, first_step, present, steps)]
    assert search(kinds, first_step).longest(present, num_steps) == max(possible, default=0)


def test_blocks_of_full_attention_are_needed_from_the_beginning() -> None:
    kinds = KVGroups((KVGroup(Reach.ALL, BLOCK), KVGroup(Reach.WINDOW, BLOCK, 6)))
    assert search(kinds, 0).needed(0, 5) == range(5)
    assert search(kinds, 0).needed(1, 5) == range(3, 5)
    assert search(kinds, 4).needed(1, 1) == range(1)


def test_a_block_has_the_key_of_its_last_tokens() -> None:
    kinds = KVGroups((KVGroup(Reach.ALL, 3 * BLOCK), KVGroup(Reach.WINDOW, 2 * BLOCK, 6)))
    keys = cast(Any, list("abcdefghijkl"))
    assert (kinds.key_tokens, kinds.step_tokens) == (BLOCK, 6 * BLOCK)
    assert kinds.keys_of(kinds.groups[0], keys, 1, 4) == ["f", "i", "l"]
    assert kinds.keys_of(kinds.groups[1], keys, 0, 2) == ["b", "d"]
