"""Routing policies: a file each, made by name."""

from __future__ import annotations

from dbnode.scheduler.policies.aibrix import AibrixPolicy
from dbnode.scheduler.policies.base import Policy
from dbnode.scheduler.policies.cost import CostPolicy
from dbnode.scheduler.policies.dynamo import DynamoPolicy
from dbnode.scheduler.policies.least_load import LeastLoadPolicy
from dbnode.scheduler.policies.prefix import PrefixPolicy
from dbnode.scheduler.policies.round_robin import RoundRobinPolicy
from stratakv.settings import RouterPolicy


def make_policy(name: RouterPolicy) -> Policy:
    """The policy of this name."""
    return _POLICIES[name]()


_POLICIES: dict[RouterPolicy, type[Policy]] = {
    RouterPolicy.COST: CostPolicy,
    RouterPolicy.PREFIX: PrefixPolicy,
    RouterPolicy.LEAST_LOAD: LeastLoadPolicy,
    RouterPolicy.ROUND_ROBIN: RoundRobinPolicy,
    RouterPolicy.DYNAMO: DynamoPolicy,
    RouterPolicy.AIBRIX: AibrixPolicy,
}
