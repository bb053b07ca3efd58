"""Loads and saves of vLLM's connector: bit for bit, block by block, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from stratakv.integrations.vllm.prefix_search import LEASE_S
from tests.integration.vllm.conftest import Make, Pool
from tests.integration.vllm.stand_in import BLOCK_SIZE, Request
from tests.support import eventually

BLOCKS = [7, 3, 50, 12]
OTHER_BLOCKS = [1, 40, 2, 30]
TOKENS = BLOCK_SIZE * len(BLOCKS) + 5


def tokens(seed: int, count: int = TOKENS) -> list[int]:
    return [seed * 1000 + n for n in range(count)]


@pytest.mark.parametrize("load", ["layerwise", "between_steps"])
def test_what_one_instance_saves_another_loads_bit_for_bit(make: Make, load: str) -> None:
    first, second = make(), make(load=load)
    seed = 1 if load == "layerwise" else 2
    first.write(Request("a", tokens(seed)), BLOCKS, seed)
    request = Request("b", tokens(seed))
    num_tokens, is_between = second.ask(request)
    assert (num_tokens, is_between) == (len(BLOCKS) * BLOCK_SIZE, load == "between_steps")
    if is_between:
        second.scheduler.blocks_allocated(request, [OTHER_BLOCKS], num_tokens)
        received: set[str] = set()
        eventually(lambda: received.update(second.step()[1]) or "b" in received, what="the load to end")
    else:
        second.schedule(request, OTHER_BLOCKS, 0, num_tokens)
        assert second.step()[2] == set()
    for loaded, written in zip(second.content(OTHER_BLOCKS), first.content(BLOCKS), strict=True):
        assert torch.equal(loaded, written)


def test_asking_again_asks_nobody_and_changes_nothing(make: Make) -> None:
    instance = make()
    instance.write(Request("a", tokens(3)), BLOCKS, 3)
    request = Request("b", tokens(3))
    answers = {instance.ask(request) for _ in range(5)}
    assert answers == {(len(BLOCKS) * BLOCK_SIZE, False)}
    assert instance.ask(request, 2 * BLOCK_SIZE) == (2 * BLOCK_SIZE, False)
    assert not instance.scheduler.request_finished(request, [[]], 0)


def test_at_least_one_token_is_computed(make: Make) -> None:
    instance = make()
    instance.write(Request("a", tokens(4)), BLOCKS, 4)
    whole = Request("b", tokens(4, len(BLOCKS) * BLOCK_SIZE))
    assert instance.ask(whole) == ((len(BLOCKS) - 1) * BLOCK_SIZE, False)
    instance.scheduler.request_finished(whole, [[]], 0)


def test_a_damaged_page_is_reported_and_the_blocks_before_it_are_whole(make: Make, pool: Pool) -> None:
    instance = make()
    instance.write(Request("a", tokens(5)), BLOCKS, 5)
    request = Request("b", tokens(5))
    num_tokens, _ = instance.ask(request)
    instance.schedule(request, OTHER_BLOCKS, 0, num_tokens)
    order = instance.scheduler.take_orders(())
    pool.damage(order.loads[0].parts[0].hits[0, 0].places[2])
    blocks_before = pool.stats().blocks
    for worker in instance.workers.values():
        worker.begin_step(order)
        worker.start_loads(order)
    instance.forward()
    assert instance.end()[2] == set(OTHER_BLOCKS[2:])
    for loaded, written in zip(instance.content(OTHER_BLOCKS[:2]), instance.content(BLOCKS[:2]), strict=True):
        assert torch.equal(loaded, written)
    eventually(lambda: pool.stats().blocks == blocks_before - 1, what="the page to be taken out")
    assert instance.ask(request) == (0, False)
    instance.scheduler.request_finished(request, [[]], 0)


def test_nothing_is_saved_that_was_computed_upon_blocks_that_did_not_come(make: Make, pool: Pool) -> None:
    writer, instance = make(), make(load_timeout_s=5)
    writer.write(Request("a", tokens(6, TOKENS)), BLOCKS, 6)
    longer = Request("b", tokens(6, TOKENS + 2 * BLOCK_SIZE))
    num_tokens, _ = instance.ask(longer)
    instance.schedule(longer, [*OTHER_BLOCKS, 20, 21], 0, num_tokens)
    before = pool.stats().blocks
    instance.begin()
    for load in instance.workers[0, 0]._step_loads:
        load.stop()
    instance.forward()
    assert instance.end()[2]
    instance.workers[0, 0]._saver.close()
    assert pool.stats().blocks <= before


def test_blocks_that_vllm_took_back_before_they_were_read_are_never_found(make: Make, pool: Pool) -> None:
    instance = make()
    request = Request("a", tokens(7))
    instance.fill(BLOCKS, 7)
    instance.schedule(request, BLOCKS, 0)
    instance.begin()
    # The step is not over, so nothing was read to its end when the request is preempted.
    for worker in instance.workers.values():
        worker.take_back(type(instance.orders)(preempted={"a"}))
    instance.fill(BLOCKS, 77)
    instance.end()
    instance.step()
    eventually(lambda: pool.stats().puts_pending == 0, what="the put to be given up")
    assert instance.ask(Request("b", tokens(7))) == (0, False)


def test_a_finished_request_keeps_its_blocks_until_they_are_saved(make: Make) -> None:
    instance = make()
    request = Request("a", tokens(8))
    instance.schedule(request, BLOCKS, 0)
    instance.begin()
    assert instance.scheduler.request_finished(request, [BLOCKS], request.num_tokens)
    instance.orders = instance.scheduler.take_orders(())
    worker = instance.workers[0, 0]
    worker._held |= instance.orders.held
    assert worker.finished() == (set(), set())
    instance.forward()
    sent: set[str] = set()
    eventually(lambda: sent.update(instance.end()[0]) or sent == {"a"}, what="the blocks to be given back")


def test_a_request_that_ends_while_it_loads_is_reported_as_received_once(make: Make) -> None:
    instance = make(load="between_steps")
    instance.write(Request("a", tokens(9)), BLOCKS, 9)
    request = Request("b", tokens(9))
    num_tokens, _ = instance.ask(request)
    instance.scheduler.blocks_allocated(request, [OTHER_BLOCKS], num_tokens)
    instance.begin()
    assert not instance.scheduler.request_finished(request, [OTHER_BLOCKS], 0)
    received = instance.end()[1]
    eventually(lambda: received.update(instance.step()[1]) or received == {"b"}, what="the load to be over")
    assert instance.step()[1] == set()


def test_a_load_that_vllm_did_not_wait_for_counts_as_failed(make: Make) -> None:
    instance = make()
    instance.write(Request("a", tokens(10)), BLOCKS, 10)
    request = Request("b", tokens(10))
    num_tokens, _ = instance.ask(request)
    instance.schedule(request, OTHER_BLOCKS, 0, num_tokens)
    instance.begin()
    assert instance.end()[2] == set(OTHER_BLOCKS)


def test_a_block_is_found_when_all_ranks_have_it(make: Make) -> None:
    ranks = ((0, 0), (1, 0))
    whole, half = make(ranks=ranks, namespace=b"tp"), make(ranks=ranks[:1], namespace=b"tp")
    half.write(Request("a", tokens(11)), BLOCKS, 11)
    assert half.ask(Request("b", tokens(11)))[0] == len(BLOCKS) * BLOCK_SIZE
    assert whole.ask(Request("c", tokens(11))) == (0, False)
    whole.write(Request("d", tokens(11)), BLOCKS, 11)
    request = Request("e", tokens(11))
    num_tokens, _ = whole.ask(request)
    assert num_tokens == len(BLOCKS) * BLOCK_SIZE
    whole.schedule(request, OTHER_BLOCKS, 0, num_tokens)
    assert whole.step()[2] == set()
    for rank in ranks[1:]:
        cache = whole.caches[rank]["layers.0.1"]
        assert torch.equal(cache[OTHER_BLOCKS], cache[BLOCKS])


def test_a_stale_answer_is_asked_for_again(make: Make) -> None:
    instance = make()
    instance.write(Request("a", tokens(12)), BLOCKS, 12)
    request = Request("b", tokens(12))
    instance.ask(request)
    lookup = instance.scheduler._requests["b"].lookup
    assert lookup is not None
    lookup.asked_at -= LEASE_S
    assert instance.ask(request)[0] == len(BLOCKS) * BLOCK_SIZE
    assert instance.scheduler._requests["b"].lookup is not lookup


def test_a_flush_drops_what_all_instances_wrote(make: Make) -> None:
    instance = make()
    instance.write(Request("a", tokens(13)), BLOCKS, 13)
    assert instance.scheduler.flush()
    assert instance.ask(Request("b", tokens(13))) == (0, False)


def test_an_instance_says_which_blocks_it_writes(make: Make) -> None:
    instance = make(ranks=((0, 0), (1, 0)))
    first = instance.workers[0, 0].spec.namespaces[0]
    assert instance.scheduler.introduction() == {"stratakv": {"namespace": first.hex()}}
