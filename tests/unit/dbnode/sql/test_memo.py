"""A transaction's answers are found again, within bounds; those of a failed one for a while longer."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.commands import Infer
from dbnode.sql.memo import Hint, KeptAnswers, MemoLimits, TransactionMemo, is_repeatable, key_of

LOOP = asyncio.new_event_loop()
"""Never run."""
LIMITS = MemoLimits(entries_max=4, bytes_max=100, ttl_s=10.0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _command(prompt: str, **options: object) -> Infer:
    return Infer(1, "role", "database", None, options, prompt)


def _answered(prompt: str, answer: str = "yes", *, is_consumed: bool = True) -> Hint:
    future: asyncio.Future[str] = LOOP.create_future()
    future.set_result(answer)
    command = _command(prompt)
    return Hint(key_of(command), command.call("s"), future, is_consumed=is_consumed)


def test_a_retry_finds_what_a_failed_transaction_had_for_a_while() -> None:
    clock = Clock()
    kept = KeptAnswers(LIMITS, clock)
    hint = _answered("a")
    for failed in (False, True):
        memo = TransactionMemo(kept)
        assert memo.put(hint)
        assert memo.end(failed=failed) == 0
        assert (TransactionMemo(kept).find(hint.key) is hint) is failed
    clock.now_s = 10.0
    assert TransactionMemo(kept).find(hint.key) is None
    kept.trim()
    assert len(kept) == 0


def test_nothing_is_kept_of_what_has_no_answer() -> None:
    kept = KeptAnswers(LIMITS, Clock())
    memo = TransactionMemo(kept)
    command = _command("a")
    hint = Hint(key_of(command), command.call("s"), LOOP.create_future())
    assert memo.put(hint)
    assert memo.end(failed=True) == 1
    assert len(kept) == 0


def test_options_and_role_tell_calls_apart() -> None:
    keys = {key_of(command) for command in (_command("a"), _command("b"), _command("a", seed=1))}
    keys.add(key_of(Infer(1, "other", "database", None, {}, "a")))
    assert len(keys) == 4
    assert key_of(_command("a", x=1, y=2)) == key_of(_command("a", y=2, x=1))


def test_what_is_drawn_by_lot_is_not_shared() -> None:
    assert is_repeatable(_command("a"))
    assert is_repeatable(_command("a", temperature=1, seed=7))
    assert not is_repeatable(_command("a", temperature=1))
    assert not is_repeatable(_command("a", dedupe=False))


@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=60), st.booleans()), max_size=30))
def test_bounds_hold_and_what_a_statement_still_needs_stays(prompts: list[tuple[str, bool]]) -> None:
    kept = KeptAnswers(LIMITS, Clock())
    memo = TransactionMemo(kept)
    needed: set[str] = set()
    for prompt, is_consumed in prompts:
        hint = _answered(prompt, is_consumed=is_consumed)
        if memo.find(hint.key) is None and memo.put(hint) and not is_consumed:
            needed.add(prompt)
    assert all(memo.find(key_of(_command(prompt))) is not None for prompt in needed)
    found = {prompt for prompt, _ in prompts if memo.find(key_of(_command(prompt))) is not None}
    assert len(found) <= LIMITS.entries_max
    assert sum(len(prompt) + len("yes") for prompt in found) <= LIMITS.bytes_max
    memo.end(failed=True)
    assert len(kept) == len(found)
