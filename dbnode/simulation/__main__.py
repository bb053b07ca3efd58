"""`python -m dbnode.simulation`, which `stratakv sim` runs: replays a trace and prints what the fleet would do."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from dbnode.simulation.errors import ProfileError
from dbnode.simulation.profiles import find_profile, with_rates_of
from dbnode.simulation.report import SimReport
from dbnode.simulation.run import SimSettings, simulate
from dbnode.simulation.trace import BLOCK_TOKENS, read_trace
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, print_json, read_settings, table_console
from stratakv.errors import SetupError
from stratakv.profile_store import ProfileStore
from stratakv.settings import RouterPolicy

GB = 1e9
EXIT_SETUP = 2
_BASE = SimSettings()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def sim(
    trace: Annotated[Path, typer.Option(help="JSON lines: timestamp (ms), input_length, output_length, hash_ids.")],
    workers: Annotated[int, typer.Option(min=1, max=1024, help="How many.")] = _BASE.workers,
    policy: Annotated[
        list[RouterPolicy] | None, typer.Option(help="Routing policy; repeatable; by default router.policy.")
    ] = None,
    block_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a block of the trace.")] = BLOCK_TOKENS,
    profile: Annotated[
        str | None, typer.Option(metavar="FILE|MODEL", help="Rates that a worker has measured: `stratakv profile`.")
    ] = None,
    prefill_tokens_per_s: Annotated[
        float | None, typer.Option(min=1, help="Prompt tokens a worker computes in a second; 7000 unless --profile.")
    ] = None,
    l1_blocks: Annotated[int, typer.Option(min=1, help="Blocks that a worker holds itself.")] = _BASE.l1_blocks,
    decode_step_ms: Annotated[
        float | None, typer.Option(min=0, help="Time per generated token; 30 unless --profile.")
    ] = None,
    pool_gb_per_s: Annotated[
        float | None,
        typer.Option(min=0, help="How fast a worker loads from a pool of all; 0: there is none; 0 unless --profile."),
    ] = None,
    pool_blocks: Annotated[int, typer.Option(min=0, help="Blocks in the pool; 0: without bounds.")] = 0,
    kv_bytes_per_token: Annotated[
        int, typer.Option(min=1, help="What is loaded for a token.")
    ] = _BASE.kv_bytes_per_token,
    ttft_max_s: Annotated[
        float, typer.Option(min=0, help="Refuse a request whose first token is expected later; 0: refuse none.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the choice between equals.")] = 0,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replay a trace of requests on a simulated fleet, with the router's own code and a clock that jumps."""
    found = read_settings(config, sets)
    router = found.router
    requests = read_trace(trace, block_tokens)
    settings = replace(
        _BASE,
        workers=workers,
        block_tokens=block_tokens,
        l1_blocks=l1_blocks,
        kv_bytes_per_token=kv_bytes_per_token,
        pool_blocks=pool_blocks,
        ttft_max_s=ttft_max_s,
        seed=seed,
        router=router,
    )
    stored = None if profile is None else find_profile(profile, ProfileStore(found.model.cache_dir))
    if stored is not None:
        settings = with_rates_of(settings, stored.profile)
    settings = _with_given(settings, profile, prefill_tokens_per_s, decode_step_ms, pool_gb_per_s)
    reports = {
        name: simulate(requests, replace(settings, router=replace(router, policy=name)))
        for name in policy or [router.policy]
    }
    if as_json:
        shown = {name: value for name, value in asdict(settings).items() if name not in ("router", "profile")}
        shown["profile"] = None if stored is None else msgspec.to_builtins(stored.key)
        print_json({"settings": shown, "policies": {name.value: found.as_json() for name, found in reports.items()}})
    else:
        _print(reports)


def _with_given(
    settings: SimSettings,
    profile: str | None,
    prefill_tokens_per_s: float | None,
    decode_step_ms: float | None,
    pool_gb_per_s: float | None,
) -> SimSettings:
    """The rates that were given as options. Raises ProfileError if a profile says the same."""
    if profile is not None and (prefill_tokens_per_s is not None or decode_step_ms is not None):
        raise ProfileError(
            "--profile says how long prompts and steps take, and so does --prefill-tokens-per-s or --decode-step-ms",
            hint="give one of them",
        )
    if prefill_tokens_per_s is not None:
        settings = replace(settings, prefill_tokens_per_s=prefill_tokens_per_s)
    if decode_step_ms is not None:
        settings = replace(settings, decode_step_s=decode_step_ms / 1000)
    if pool_gb_per_s is not None:
        settings = replace(settings, pool_bytes_per_s=pool_gb_per_s * GB)
    return settings


def _print(reports: dict[RouterPolicy, SimReport]) -> None:
    from rich.table import Table

    table = Table("policy", "TTFT mean", "p50", "p99", "hits", "of one infinite cache", "refused")
    for name, found in reports.items():
        table.add_row(
            name.value,
            *(f"{value:.2f} s" for value in (found.ttft_mean_s, found.ttft_p50_s, found.ttft_p99_s)),
            f"{found.hit_share:.1%}",
            f"{found.hit_share_of_infinite:.1%}",
            str(found.refused),
        )
    console = table_console()
    console.print(table, markup=False)


def main() -> int:
    try:
        app(prog_name="stratakv sim")
    except SetupError as error:
        print(f"stratakv: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"stratakv: {error.hint}", file=sys.stderr)
        return EXIT_SETUP
    return 0


if __name__ == "__main__":
    sys.exit(main())
