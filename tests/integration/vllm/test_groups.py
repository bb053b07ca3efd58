"""Models of several groups of layers: what each group needs is found, held, saved and loaded; blocks of two sizes."""

from __future__ import annotations

import pytest
import torch

from stratakv.integrations.vllm.groups import KVGroup, KVGroups, Reach
from tests.integration.vllm.conftest import Make, Pool
from tests.integration.vllm.stand_in import Instance, Request
from tests.support import eventually

STEP = 32
GROUPS = KVGroups((KVGroup(Reach.WINDOW, 16, 20), KVGroup(Reach.ALL, 32), KVGroup(Reach.WINDOW, 16, 60)))
TOKENS = 5 * STEP + 3
TABLES = [list(range(1, 12)), list(range(12, 18)), list(range(18, 29))]
OTHER_TABLES = [[0] * 8 + [30, 31], [32, 33, 34, 35, 36], [0] * 6 + [40, 41, 42, 43]]
"""As vLLM allocates them for five steps: null before the windows."""


@pytest.fixture
def hybrid(make: Make) -> Instance:
    return make(groups=GROUPS, namespace=b"hybrid")


def tokens(seed: int, count: int = TOKENS) -> list[int]:
    return [seed * 1000 + n for n in range(count)]


def fill_all(instance: Instance, seed: int) -> None:
    for group, table in enumerate(TABLES):
        instance.fill(table, seed + group, group)


def load(instance: Instance, request: Request, num_tokens: int) -> set[str]:
    """Load between steps into the other tables; what was received."""
    instance.scheduler.blocks_allocated(request, OTHER_TABLES, num_tokens)
    received: set[str] = set()
    eventually(lambda: received.update(instance.step()[1]) or bool(received), what="the load to end")
    return received


def test_each_group_gets_the_blocks_that_it_needs_bit_for_bit(hybrid: Instance) -> None:
    fill_all(hybrid, 1)
    hybrid.write_tables(Request("a", tokens(1)), TABLES)
    request = Request("b", tokens(1))
    assert hybrid.ask(request) == (5 * STEP, True)
    assert load(hybrid, request, 5 * STEP) == {"b"}
    assert not hybrid.failed
    for group, table in enumerate(OTHER_TABLES):
        start = next(n for n, block in enumerate(table) if block)
        written = hybrid.content(TABLES[group][start : len(table)], group)
        for loaded, was_written in zip(hybrid.content(table[start:], group), written, strict=True):
            assert torch.equal(loaded, was_written)
        assert not any(cache[0].any() for cache in hybrid.content([0], group)), "a null block was written"
    hybrid.scheduler.request_finished(request, OTHER_TABLES, 0)


def test_a_prefix_ends_where_every_window_is_there(hybrid: Instance) -> None:
    """vLLM had freed the first blocks of the wider window before they could be saved."""
    fill_all(hybrid, 4)
    tables = [TABLES[0], TABLES[1], [0] * 5 + TABLES[2][5:]]
    hybrid.write_tables(Request("a", tokens(2)), tables)
    # Behind four steps the wider window reads from token 69, in block 4; behind five from token 101, in block 6.
    assert hybrid.ask(Request("c", tokens(2, 4 * STEP + 1))) == (0, False)
    assert hybrid.ask(Request("b", tokens(2))) == (5 * STEP, True)


def test_what_vllm_has_itself_is_not_loaded(hybrid: Instance) -> None:
    fill_all(hybrid, 7)
    hybrid.write_tables(Request("a", tokens(3)), TABLES)
    request = Request("b", tokens(3))
    assert hybrid.ask(request, 4 * STEP) == (STEP, True)
    hybrid.scheduler.blocks_allocated(request, OTHER_TABLES, STEP)
    (order,) = hybrid.scheduler.take_orders(()).loads
    assert {part.group: list(part.blocks) for part in order.parts} == {0: [30, 31], 1: [36], 2: [42, 43]}
    hybrid.workers[0, 0].start_loads(type(hybrid.orders)(loads=[order]))
    eventually(lambda: "b" in hybrid.step()[1], what="the load to end")


def test_blocks_of_windows_are_held_until_they_are_saved(hybrid: Instance) -> None:
    fill_all(hybrid, 10)
    request = Request("a", tokens(4))
    hybrid.schedule_tables(request, TABLES, 0)
    of_windows = [block for group in (0, 2) for block in hybrid.cache.tables["a"].blocks[group][:10]]
    assert {block.users for block in of_windows} == {2}
    assert {block.users for block in hybrid.cache.tables["a"].blocks[1]} == {1}, "vLLM keeps these by itself"
    hybrid.step()
    eventually(lambda: hybrid.step() and {block.users for block in of_windows} == {1}, what="the holds to end")
    hybrid.scheduler.request_finished(request, TABLES, 0)


def test_holds_of_a_preempted_request_end_too(hybrid: Instance) -> None:
    request = Request("a", tokens(5))
    hybrid.schedule_tables(request, TABLES, 0)
    blocks = hybrid.cache.tables["a"].blocks[0][:10]
    hybrid.begin()
    for worker in hybrid.workers.values():
        worker.take_back(type(hybrid.orders)(preempted={"a"}))
    hybrid.end()
    eventually(lambda: hybrid.step() and {block.users for block in blocks} == {1}, what="the holds to end")
    assert hybrid.ask(Request("b", tokens(5))) == (0, False)


def test_a_load_of_which_any_part_fails_is_reported_as_failed_and_not_tried_again(hybrid: Instance, pool: Pool) -> None:
    fill_all(hybrid, 13)
    hybrid.write_tables(Request("a", tokens(6)), TABLES)
    request = Request("b", tokens(6))
    num_tokens, _ = hybrid.ask(request)
    hybrid.scheduler.blocks_allocated(request, OTHER_TABLES, num_tokens)
    orders = hybrid.scheduler.take_orders(())
    pool.damage(orders.loads[0].parts[2].hits[0, 0].places[1])
    hybrid.workers[0, 0].start_loads(orders)
    received: set[str] = set()
    bad: set[int] = set()

    def has_come() -> bool:
        _, came, blocks = hybrid.step()
        received.update(came)
        bad.update(blocks)
        return bool(received)

    eventually(has_come, what="the load to end")
    assert hybrid.failed == {"b"}
    assert not bad, "vLLM does not want to know of single blocks"
    assert hybrid.ask(request) == (0, False)
