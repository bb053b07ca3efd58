"""`python -m dbnode.simulation`, which `stratakv sim` runs: replays a trace and prints what the fleet would do."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from dbnode.simulation.report import SimReport
from dbnode.simulation.run import SimSettings, simulate
from dbnode.simulation.trace import BLOCK_TOKENS, read_trace
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, print_json, read_settings, table_console
from stratakv.errors import SetupError
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
    prefill_tokens_per_s: Annotated[
        float, typer.Option(min=1, help="Prompt tokens a worker computes in a second.")
    ] = _BASE.prefill_tokens_per_s,
    l1_blocks: Annotated[int, typer.Option(min=1, help="Blocks that a worker holds itself.")] = _BASE.l1_blocks,
    decode_step_ms: Annotated[float, typer.Option(min=0, help="Time per generated token.")] = 30.0,
    pool_gb_per_s: Annotated[
        float, typer.Option(min=0, help="How fast a worker loads from a pool of all; 0: there is none.")
    ] = 0.0,
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
    router = read_settings(config, sets).router
    requests = read_trace(trace, block_tokens)
    settings = SimSettings(
        workers=workers,
        block_tokens=block_tokens,
        prefill_tokens_per_s=prefill_tokens_per_s,
        l1_blocks=l1_blocks,
        decode_step_s=decode_step_ms / 1000,
        kv_bytes_per_token=kv_bytes_per_token,
        pool_bytes_per_s=pool_gb_per_s * GB,
        pool_blocks=pool_blocks,
        ttft_max_s=ttft_max_s,
        seed=seed,
        router=router,
    )
    reports = {
        name: simulate(requests, replace(settings, router=replace(router, policy=name)))
        for name in policy or [router.policy]
    }
    if as_json:
        shown = {name: value for name, value in asdict(settings).items() if name != "router"}
        print_json({"settings": shown, "policies": {name.value: found.as_json() for name, found in reports.items()}})
    else:
        _print(reports)


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
