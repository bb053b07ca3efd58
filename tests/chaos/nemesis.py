"""Kills, or freezes, one process at a chosen step of a write, and has it come back; once per round."""

from __future__ import annotations

import asyncio
import enum
import itertools
import random
from dataclasses import dataclass

from tests.chaos import bait
from tests.chaos.history import History, Kind
from tests.chaos.world import LEASE_S, World
from tests.chaos.writers import Step, Writers

IN_FLIGHT_S_MAX = 0.004
"""Between the asking for an end and the kill."""


class Victim(enum.StrEnum):
    """What is struck."""

    LEADER = "the leader is killed"
    STANDBY = "the one that stands by is killed"
    POSTGRES = "PostgreSQL is killed"
    FROZEN_LEADER = "the leader is frozen past its lease"


@dataclass(frozen=True, slots=True)
class Plan:
    victim: Victim
    api: str
    step: Step

    def __str__(self) -> str:
        return f"{self.victim} {self.step} of a {self.api} write"


def plans(source: random.Random) -> list[Plan]:
    """Every victim in every step of a write by either API, in random order."""
    every = [Plan(*choice) for choice in itertools.product(Victim, ("native", "kvcm"), Step)]
    source.shuffle(every)
    return every


class Nemesis:
    """Waits for a writer to reach the plan's step."""

    def __init__(self, world: World, history: History, source: random.Random) -> None:
        self._world = world
        self._history = history
        self._random = source
        self._plan: Plan | None = None
        self._leader = 0
        self._struck = asyncio.Event()

    async def at_step(self, api: str, step: Step) -> None:
        """A writer is there."""
        plan = self._plan
        if plan is None or (plan.api, plan.step) != (api, step):
            return
        self._plan = None
        if step is Step.ENDING:
            await asyncio.sleep(self._random.uniform(0.0, IN_FLIGHT_S_MAX))
        self._history.add(Kind.FAULT, what=str(plan))
        self._strike(plan.victim)
        self._struck.set()

    async def carry_out(self, plan: Plan, writers: Writers) -> None:
        """Strike at the step, and let the victim come back; a killed one sooner or later than its lease ends."""
        leader = None
        while leader is None:
            leader = await self._world.leader()
        self._leader = leader
        baits = await bait.lay(writers) if plan.victim is Victim.FROZEN_LEADER else []
        self._struck.clear()
        self._plan = plan
        await self._struck.wait()
        if plan.victim is Victim.FROZEN_LEADER:
            asking = asyncio.create_task(bait.ask(writers, self._world.servers[self._leader].endpoint, baits))
            await asyncio.sleep(self._random.uniform(1.5, 2.5) * LEASE_S)
            self._world.wake_server(self._leader)
            await asking
        else:
            await asyncio.sleep(self._random.uniform(0.0, 1.5) * LEASE_S)
            await self._restart(plan.victim)
        self._history.add(Kind.FAULT, what="it is back")

    def _strike(self, victim: Victim) -> None:
        if victim is Victim.POSTGRES:
            self._world.kill_postgres()
        elif victim is Victim.LEADER:
            self._world.kill_server(self._leader)
        elif victim is Victim.STANDBY:
            self._world.kill_server(1 - self._leader)
        else:
            self._world.freeze_server(self._leader)

    async def _restart(self, victim: Victim) -> None:
        if victim is Victim.POSTGRES:
            await self._world.start_postgres()
        else:
            self._world.start_server(self._leader if victim is Victim.LEADER else 1 - self._leader)
