"""What hosts report, against a plain model; and what a host is told that cannot be followed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meta_server.kvcm.errors import CapacityReached, NodeNotRegistered, SnapshotRateLimited, SnapshotRequired
from meta_server.kvcm.reported import SNAPSHOT_INTERVAL_S, InstanceReports, Reports, Specs
from meta_server.own_blocks import HostMatch

HOSTS, MEDIA, KEYS = ("h0", "h1", "h2"), ("mem", "disk"), range(5)
WHOLE, GROUP = Specs({"tp0", "tp1"}), Specs({"tp0"})
parts = st.sampled_from([Specs(), WHOLE, GROUP, Specs({"tp1"})])
blocks = st.tuples(st.sampled_from(MEDIA), st.sampled_from(KEYS), parts)
steps = st.one_of(
    st.tuples(st.just("register"), st.sampled_from(HOSTS)),
    st.tuples(st.just("down"), st.sampled_from(HOSTS)),
    st.tuples(st.just("add"), st.sampled_from(HOSTS), blocks),
    st.tuples(st.just("delete"), st.sampled_from(HOSTS), blocks),
    st.tuples(st.just("snapshot"), st.sampled_from(HOSTS), st.sampled_from(["", *MEDIA]), st.lists(blocks, max_size=6)),
)
Model = dict[str, dict[tuple[str, int], Specs]]
"""Host → (medium, key) → parts."""


def follow(model: Model, step: tuple, reports: InstanceReports, now: float) -> None:
    kind, host = step[:2]
    if kind == "register":
        reports.register(host, now)
        model[host] = {}
    elif kind == "down":
        reports.drop(host)
        model.pop(host, None)
    elif host not in model:
        with pytest.raises(NodeNotRegistered):
            reports.heard(host, now)
    elif kind == "snapshot":
        medium, found = step[2], [b for b in step[3] if step[2] in ("", b[0])]
        reports.snapshot(host, medium, found, now)
        model[host] = {at: had for at, had in model[host].items() if medium not in ("", at[0])}
        model[host].update({(where, key): specs or WHOLE for where, key, specs in found})
    else:
        medium, key, specs = step[2]
        had = model[host].get((medium, key))
        if kind == "add":
            reports.add(host, medium, key, specs)
            model[host][medium, key] = (had or Specs()) | (specs or WHOLE)
        else:
            reports.delete(host, medium, key, specs)
            left = (had or Specs()) - (specs or WHOLE)
            model[host].pop((medium, key), None)
            if left:
                model[host][medium, key] = left


def expected(model: Model, media: frozenset[str]) -> set[HostMatch]:
    def has(host: str, key: int) -> bool:
        found = (model[host].get((medium, key)) for medium in media or MEDIA)
        return any(specs is not None and (not specs or specs >= GROUP) for specs in found)

    total = next((key for key in KEYS if not any(has(host, key) for host in model)), len(KEYS))
    matches = set()
    for host in model:
        local = next((key for key in KEYS if not has(host, key)), len(KEYS))
        if local:
            matches.add(HostMatch(host, local, sum(not has(host, key) for key in range(total)), total))
    return matches


@settings(max_examples=300)
@given(st.lists(steps, max_size=40), st.sampled_from([frozenset[str](), frozenset({"mem"}), frozenset(MEDIA)]))
def test_hosts_are_matched_as_their_reports_say(history: list[tuple], media: frozenset[str]) -> None:
    reports, model = InstanceReports([WHOLE, GROUP], 1000), dict[str, dict[tuple[str, int], Specs]]()
    for now, step in enumerate(history):
        follow(model, step, reports, now * SNAPSHOT_INTERVAL_S)
    found = reports.matches(list(KEYS), media)
    assert len(found) == len(set(found))
    assert set(found) == expected(model, media)
    assert reports.num_blocks == sum(map(len, model.values()))


def test_a_host_of_which_something_was_not_taken_must_send_a_snapshot() -> None:
    reports = InstanceReports([WHOLE], 2)
    reports.register("h", 0.0)
    reports.add("h", "mem", 1, Specs())
    reports.add("h", "mem", 2, Specs())
    with pytest.raises(CapacityReached):
        reports.add("h", "mem", 3, Specs())
    for change in (reports.add, reports.delete):
        with pytest.raises(SnapshotRequired):
            change("h", "mem", 1, Specs())
    reports.snapshot("h", "", [("mem", 7, Specs())], 1.0)
    reports.add("h", "mem", 8, Specs())
    assert [match.local for match in reports.matches([7, 8], frozenset())] == [2]


def test_snapshots_that_come_too_fast_are_told_when_to_come_again() -> None:
    reports = InstanceReports([WHOLE], 10)
    reports.register("h", 0.0)
    assert reports.snapshot("h", "mem", [], 1.0) == "1"
    with pytest.raises(SnapshotRateLimited) as refused:
        reports.snapshot("h", "mem", [], 1.0 + SNAPSHOT_INTERVAL_S / 4)
    assert refused.value.retry_after_ms == 750 * SNAPSHOT_INTERVAL_S
    assert reports.snapshot("h", "mem", [], 1.0 + SNAPSHOT_INTERVAL_S) == "2"


def test_a_silent_host_is_gone_with_its_blocks() -> None:
    now = 0.0
    reports = Reports(lambda: now, silence_s=10.0, blocks_max=10)
    instance = reports.of("i", [WHOLE])
    instance.register("h", now)
    instance.add("h", "mem", 1, Specs())
    now = 10.0
    reports.tick()
    assert len(reports.matches("i", [1], frozenset())) == 1
    now = 10.1
    reports.tick()
    assert reports.matches("i", [1], frozenset()) == []
    assert instance.num_blocks == 0
    with pytest.raises(NodeNotRegistered):
        instance.heard("h", now)
