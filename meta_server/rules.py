"""What operators have said of namespaces: how long pages stay unread, how much room they may take in each tier, or that they stay.

Looked at once a second, by the server's dispatch; kept in PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterable

from meta_server.ages import Ages
from meta_server.catalog import Catalog
from meta_server.journal import Journal
from meta_server.nodes import Node
from meta_server.presence import Clock
from meta_server.slots import SlotArray
from stratakv.errors import Overloaded
from stratakv.log import EventLogger
from stratakv.wire import CacheRule

APPLY_S = 1.0
RULES_MAX = 10_000
_log = EventLogger("meta_server.rules")


class Rules:
    """Rules by namespace."""

    def __init__(
        self, catalog: Catalog, journal: Journal, clock: Clock, ages: Ages, rules: Iterable[CacheRule]
    ) -> None:
        self._catalog = catalog
        self._journal = journal
        self._clock = clock
        self._by_namespace: dict[bytes, CacheRule] = {}
        self._ages = ages
        self._apply_at = clock()
        for rule in rules:
            self._take(rule)

    def namespaces(self) -> list[bytes]:
        """Those that have a rule."""
        return list(self._by_namespace)

    def get(self, namespace: bytes) -> CacheRule:
        """The namespace's rule; one that says nothing if there is none."""
        return self._by_namespace.get(namespace, CacheRule(namespace))

    def set(self, rule: CacheRule) -> None:
        """Take a rule in the place of the one before. Raises Overloaded, Unavailable."""
        self._journal.check_room()
        if rule.namespace not in self._by_namespace and len(self._by_namespace) >= RULES_MAX:
            raise Overloaded(f"{RULES_MAX} namespaces have rules already")
        self._take(rule)
        self._journal.set_rule(rule)

    def apply(self) -> None:
        """Remove what has outstayed its rule."""
        now = self._clock()
        if now < self._apply_at:
            return
        self._apply_at = now + APPLY_S
        self._ages.sample(self._catalog.index.tick)
        for rule in self._by_namespace.values():
            if rule.ttl_s:
                self._expire(rule)
            for is_disk, bytes_max in ((False, rule.memory_bytes_max), (True, rule.disk_bytes_max)):
                if bytes_max:
                    self._shrink(
                        rule.namespace, bytes_max, [n for n in self._catalog.nodes if n.segment.is_disk is is_disk]
                    )

    def _take(self, rule: CacheRule) -> None:
        self._catalog.index.keep(rule.namespace, rule.is_kept)
        if rule == CacheRule(rule.namespace):
            self._by_namespace.pop(rule.namespace, None)
        else:
            self._by_namespace[rule.namespace] = rule

    def _expire(self, rule: CacheRule) -> None:
        tick = self._ages.tick_before(rule.ttl_s)
        if tick is not None:
            self._remove(self._catalog.index.read_before(rule.namespace, tick + 1), "expired")

    def _shrink(self, namespace: bytes, bytes_max: int, nodes: list[Node]) -> None:
        index = self._catalog.index
        excess = sum(index.size_of(namespace, node.index) for node in nodes) - bytes_max
        for node in nodes:
            excess -= self._catalog.drop_spare(node, excess, namespace)
        sizes = {node.index: index.size_of(namespace, node.index) for node in nodes}
        for segment, size in sorted(sizes.items(), key=lambda item: -item[1]):
            if excess <= 0:
                return
            slots = index.coldest(segment, min(excess, size), namespace)
            excess -= int(index.extents(slots)[1].sum())
            self._remove(slots, "quota")

    def _remove(self, slots: SlotArray, reason: str) -> None:
        if len(slots):
            self._catalog.remove(slots, reason)
            _log.debug("pages_removed", reason=reason, pages=len(slots))
