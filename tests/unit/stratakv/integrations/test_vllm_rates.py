"""When the connector loads and when it has vLLM compute."""

from __future__ import annotations

from stratakv.integrations.vllm.rates import COMPUTED_TOKENS_MIN, VALID_S, Distance, Rates


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_was_never_measured_is_tried() -> None:
    rates = Rates()
    assert rates.is_worth_loading(Distance.FAR)
    rates.computed(1000, 1.0)
    assert rates.is_worth_loading(Distance.FAR)


def test_a_pool_that_is_slower_than_the_model_is_left_alone_until_it_is_tried_again() -> None:
    clock = Clock()
    rates = Rates(clock)
    rates.computed(1000, 1.0)
    rates.loaded({Distance.FAR: 100}, {Distance.FAR: 1.0})
    rates.loaded({Distance.NEAR: 100_000}, {Distance.NEAR: 1.0})
    assert not rates.is_worth_loading(Distance.FAR)
    assert rates.is_worth_loading(Distance.NEAR)
    clock.now = VALID_S + 1
    assert rates.is_worth_loading(Distance.FAR)


def test_small_steps_say_nothing_of_the_models_speed() -> None:
    rates = Rates()
    rates.computed(COMPUTED_TOKENS_MIN - 1, 1e-6)
    rates.loaded({Distance.FAR: 1}, {Distance.FAR: 100.0})
    assert rates.is_worth_loading(Distance.FAR)
