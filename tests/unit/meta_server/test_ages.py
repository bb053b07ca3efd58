"""How old a tick is at least, and which ticks have an age."""

from __future__ import annotations

from meta_server.ages import SAMPLE_S, Ages


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_age_is_known_from_the_first_sample_that_had_reached_the_tick() -> None:
    clock = Clock()
    ages = Ages(clock)
    assert ages.age_s(5) == 0.0
    assert ages.tick_before(0.0) is None
    for tick in (10, 10, 20):
        ages.sample(tick)
        clock.now += SAMPLE_S
    assert ages.age_s(10) == 3 * SAMPLE_S
    assert ages.age_s(11) == SAMPLE_S
    assert ages.age_s(21) == 0.0
    assert ages.tick_before(SAMPLE_S) == 20
    assert ages.tick_before(SAMPLE_S + 1) == 10
    assert ages.tick_before(3 * SAMPLE_S + 1) is None


def test_samples_are_taken_no_more_often_than_ages_are_told() -> None:
    clock = Clock()
    ages = Ages(clock)
    ages.sample(1)
    clock.now += SAMPLE_S / 2
    ages.sample(2)
    assert ages.age_s(2) == 0.0
    clock.now += SAMPLE_S / 2
    ages.sample(3)
    assert (ages.age_s(1), ages.age_s(2)) == (SAMPLE_S, 0.0)
