"""`stratakv profile`: what workers of this machine have measured of themselves."""

from __future__ import annotations

import time

import msgspec
from rich.table import Table

from stratakv.cli.options import ConfigOption, JsonOption, SetOption, print_json, read_settings, table_console


def profile(config: ConfigOption = None, sets: SetOption = None, as_json: JsonOption = False) -> None:
    """Rates that workers of this machine have measured: prefill, decode, bandwidth of the tiers."""
    from stratakv.profile_store import ProfileStore, StoredProfile

    def row(stored: StoredProfile) -> list[str]:
        key, found = stored.key, stored.profile
        age_h = (time.time() - stored.measured_at_unix_s) / 3600
        return [
            f"{key.model} {key.dtype}",
            f"{key.device}, {key.threads} threads",
            "\n".join(f"{p.num_tokens} + {p.num_cached}: {p.seconds * 1e3:.0f} ms" for p in found.prefill),
            "\n".join(f"{p.num_sequences} × {p.context_tokens}: {p.step_s * 1e3:.1f} ms" for p in found.decode),
            "\n".join(f"{tier}: {rate / 1e9:.2f} GB/s" for tier, rate in found.load_bytes_per_s.items()),
            f"{age_h:.1f} h" + ("" if stored.is_fresh(time.time()) else ", too old"),
        ]

    store = ProfileStore(read_settings(config, sets).model.cache_dir)
    if as_json:
        print_json(msgspec.to_builtins(store.all()))
        return
    table = Table("model", "device", "prefill: new + cached", "decode step: sequences × context", "tiers", "age")
    for stored in store.all():
        table.add_row(*row(stored))
    table_console().print(table)
