"""Classes of service: how soon a request's first token should come, and how fast the others. Pure.

A request names its class, or has that of the face it came in by; what a class promises is in the settings ([router]).
"""

from __future__ import annotations

import msgspec

from dbnode.generate import SloClass, Source
from stratakv.settings import RouterSettings


class SloTargets(msgspec.Struct, frozen=True):
    """0 is no target."""

    ttft_s: float = 0.0
    """A request whose first token is expected later is refused."""
    tpot_s: float = 0.0
    """Workers that take longer for a token are avoided."""


def targets_of(settings: RouterSettings, slo_class: SloClass | None, source: Source) -> SloTargets:
    """Of a request that names this class, or none."""
    if (slo_class or _OF_FACE[source]) is SloClass.INTERACTIVE:
        return SloTargets(settings.interactive_ttft_s, settings.interactive_tpot_s)
    return SloTargets(settings.batch_ttft_s, settings.batch_tpot_s)


_OF_FACE = {Source.REST: SloClass.INTERACTIVE, Source.SQL: SloClass.BATCH}
