"""The main job, start to end: everything is started, a table is summarised from SQL, a long prompt is asked three times.

`make demo` runs this. The second time the workers have dropped what they hold themselves, so the prompt's KV comes from the
pool. Before the third time the daemon that holds it is killed, and the answer comes all the same. `--keep` leaves everything
running.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import psycopg
from rich.console import Console
from rich.table import Table

from stratakv.errors import SetupError
from stratakv.rest_client import Answer, Messages, RestClient
from stratakv.up.instance import Instance, running_instance

EXAMPLES = Path(__file__).parent
SUMMARY = """
SELECT id, infer('Summarise in one sentence: ' || body, options => '{"max_tokens": 48}')
FROM tickets ORDER BY id
"""
QUESTION = "In one sentence: what is a thermostat for?"

console = Console()


def shift_log(num_entries: int) -> str:
    """A deterministic support log; 94 entries are about 2,500 tokens."""
    products = ("router", "thermostat", "garden camera", "kitchen speaker", "door lock", "smoke detector")
    faults = (
        "restarts at night",
        "shows the wrong temperature",
        "does not record",
        "answers the television",
        "will not pair",
    )
    actions = (
        "sent a new power supply",
        "asked for the log file",
        "updated the firmware",
        "booked a visit",
        "closed the case",
    )
    lines = []
    for number in range(num_entries):
        product, fault, action = products[number % 6], faults[number * 7 % 5], actions[number * 3 % 5]
        lines.append(
            f"{8 + number // 10:02d}:{number * 6 % 60:02d} customer {1200 + number * 37}: the {product} {fault}; we {action}."
        )
    return "\n".join(lines)


def history() -> Messages:
    """A conversation of about 2,500 tokens and a question about it."""
    return [
        {"role": "system", "content": "You help the support team. Here is today's log.\n" + shift_log(94)},
        {"role": "user", "content": QUESTION},
    ]


def summarise_tickets(sql_url: str) -> None:
    with psycopg.connect(sql_url, autocommit=True) as connection:
        connection.execute((EXAMPLES / "tickets.sql").read_bytes())
        console.print(f"\n[bold]SQL through {sql_url}[/]:{SUMMARY}")
        started = time.perf_counter()
        rows = connection.execute(SUMMARY).fetchall()
    table = Table("id", "infer", show_lines=True)
    for number, text in rows:
        table.add_row(str(number), text.strip())
    console.print(table)
    console.print(f"{len(rows)} rows in {time.perf_counter() - started:.1f} s\n")


def ask(client: RestClient, model: str) -> Answer:
    return client.chat(history(), model=model, max_tokens=32)


def forget(client: RestClient) -> None:
    """The workers drop what they hold themselves; the pool keeps its pages."""
    client.post("/admin/cache/drop", {"tiers": ["l1", "l2"]})


def kill_daemon(instance: Instance) -> None:
    """The one on whose segment the prefill worker writes. `stratakv up` starts it again, with an empty segment."""
    pid = instance.pid("dmp-0")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def show_answers(first: Answer, again: Answer, after_kill: Answer) -> None:
    table = Table("", "TTFT", "computed", "from L1", "from L2", "from the pool")
    for label, answer in (
        ("first time", first),
        ("again, after the workers dropped L1 and L2", again),
        ("again, after kill -9 of the daemon that held it", after_kill),
    ):
        tiers = answer.tokens_by_tier()
        table.add_row(
            label, f"{answer.ttft_s * 1e3:.0f} ms", *(str(tiers[t]) for t in ("computed", "l1", "l2", "pool"))
        )
    console.print(f"[bold]REST[/]: a question about {first.usage['prompt_tokens']} tokens of history")
    console.print(table)
    console.print(f"answer: {again.text.strip()}")
    console.print(f"time to first token {first.ttft_s / again.ttft_s:.1f} times shorter\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave everything running and print the URLs")
    keep = parser.parse_args().keep
    try:
        with running_instance() as instance:
            return run(instance, keep)
    except SetupError as error:
        console.print(f"demo: {error.message}")
        return 2
    except KeyboardInterrupt:
        return 130


def run(instance: Instance, keep: bool) -> int:
    state = instance.state
    summarise_tickets(state["sql_url"])
    client = RestClient(state["rest_url"])
    first = ask(client, state["model"])
    forget(client)
    again = ask(client, state["model"])
    kill_daemon(instance)
    forget(client)
    after_kill = ask(client, state["model"])
    client.close()
    show_answers(first, again, after_kill)
    if keep:
        console.print(f"still running: SQL {state['sql_url']}, REST {state['rest_url']}/v1; Ctrl-C ends it")
        instance.process.wait()
    return 0 if again.tokens_by_tier()["pool"] > 0 and after_kill.text else 1


if __name__ == "__main__":
    sys.exit(main())
