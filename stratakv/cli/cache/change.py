"""`stratakv cache flush | rule | pin | unpin`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from stratakv.cli.cache.common import ModelOption, ask_meta, choose_namespaces, parse_seconds, parse_size, show_seconds
from stratakv.cli.cache.stats import namespace_json, rule_text
from stratakv.cli.options import ConfigOption, JsonOption, SetOption, StateFileOption, print_json, running_settings
from stratakv.errors import InvalidRequest
from stratakv.process import reachable_host
from stratakv.rest_client import RestClient
from stratakv.wire import CacheRule, Done, Flush, Flushed, NamespaceState, SetCacheRule, SetNodeLimit, Unpin

if TYPE_CHECKING:
    from stratakv.pool.shards import PoolClient

EXIT_NOTHING_PINNED = 1


def flush(
    namespace: Annotated[
        str | None, typer.Option("--namespace", metavar="HEX", help="Only this one; the beginning of its name will do.")
    ] = None,
    model: ModelOption = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Drop all pages that nobody reads and nothing pins: of one namespace, of a model, or all there are."""

    async def ask(client: PoolClient) -> int:
        if namespace is None and model is None:
            return (await client.call(Flush(), Flushed)).num_blocks
        chosen = await choose_namespaces(client, namespace, model)
        return sum([(await client.call(Flush(state.namespace), Flushed)).num_blocks for state in chosen])

    num_blocks = ask_meta(running_settings(config, sets, state_file), ask)
    if as_json:
        print_json({"blocks": num_blocks})
    else:
        print(f"{num_blocks} blocks dropped")


def rule(
    namespace: Annotated[str | None, typer.Argument(metavar="[NAMESPACE]", help="Its name, or the beginning.")] = None,
    model: ModelOption = None,
    ttl: Annotated[
        str | None, typer.Option(metavar="TIME", help="Drop what nobody asked for in so long: 90s, 15m, 1h; 0: never.")
    ] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Most it may have in memory; 0: no limit.")] = None,
    disk: Annotated[str | None, typer.Option(metavar="SIZE", help="Most it may have on disk; 0: no limit.")] = None,
    keep: Annotated[
        bool | None, typer.Option("--keep/--no-keep", help="It stays as long as there is anything else to drop.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Take back the whole rule first.")] = False,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a namespace may have; without options, show what was said. What is not named stays as it was."""
    if (namespace is None) == (model is None):
        raise InvalidRequest("give a namespace or --model NAME")
    given = {
        "ttl_s": None if ttl is None else parse_seconds(ttl),
        "memory_bytes_max": None if memory is None else parse_size(memory),
        "disk_bytes_max": None if disk is None else parse_size(disk),
        "is_kept": keep,
    }
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}

    async def ask(client: PoolClient) -> list[NamespaceState]:
        chosen = await choose_namespaces(client, namespace, model)
        if not changes and not clear:
            return chosen
        ruled = []
        for state in chosen:
            before = CacheRule(state.namespace) if clear else state.rule
            after = msgspec.structs.replace(before, **changes)
            await client.call(SetCacheRule(after), Done)
            ruled.append(msgspec.structs.replace(state, rule=after))
        return ruled

    ruled = ask_meta(running_settings(config, sets, state_file), ask)
    if as_json:
        print_json([namespace_json(state) for state in ruled])
        return
    for state in ruled:
        print(f"{state.namespace.hex()}: {rule_text(state.rule) or 'no rule'}")


def pin(
    text: Annotated[str | None, typer.Option("--text", help="The prompt, as a user's message of a chat.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--prompt-file", metavar="FILE", exists=True, dir_okay=False, help="The same, from a file."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The text as it is, as /v1/completions takes it.")] = False,
    duration: Annotated[str, typer.Option("--for", metavar="TIME", help="How long: 90s, 15m, 1h, at most 30d.")] = "1h",
    model: Annotated[str | None, typer.Option(help="By default the one that is served.")] = None,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep what the pool has of a prompt, whatever room is needed for. Exits 1 if it has nothing of it."""
    settings = running_settings(config, sets, state_file)
    body = _pin_body(prompt_file.read_text() if prompt_file is not None else text, system, raw)
    body |= {"seconds": parse_seconds(duration)} | ({"model": model} if model is not None else {})
    url = f"http://{reachable_host(settings.rest.host)}:{settings.rest.port}"
    client = RestClient(url, api_key=settings.rest.api_key)
    try:
        answer = client.post("/v1/stratakv/pin", body)
    finally:
        client.close()
    if as_json:
        print_json(answer)
    else:
        for one in answer["pins"]:
            print(f"{one['blocks']} blocks kept for {show_seconds(body['seconds'])}: stratakv cache unpin {one['id']}")
        if not answer["pins"]:
            print("The pool has no whole block of this prompt: send it to the model once, then pin it.")
    if not answer["pins"]:
        raise typer.Exit(EXIT_NOTHING_PINNED)


def _pin_body(text: str | None, system: str | None, raw: bool) -> dict[str, Any]:
    """Raises InvalidRequest."""
    if text is None and (system is None or raw):
        raise InvalidRequest("nothing to pin", hint="Give --text, --prompt-file or --system.")
    if raw:
        if system is not None:
            raise InvalidRequest("a raw prompt has no system prompt beside it")
        return {"prompt": text}
    parts = (("system", system), ("user", text))
    return {"messages": [{"role": role, "content": content} for role, content in parts if content is not None]}


def resize(
    node: Annotated[str, typer.Argument(metavar="NODE", help="The daemon.")],
    size: Annotated[
        str, typer.Argument(metavar="SIZE", help="How much of its segment it may use; `full` for all of it.")
    ],
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Let a daemon use only a part of its memory: the coldest pages go to its disk or are dropped, the host gets the rest."""
    limit_bytes = 0 if size == "full" else parse_size(size)
    if size != "full" and not limit_bytes:
        raise InvalidRequest("a daemon needs some memory", hint="`stratakv drain dmp` takes it out of service.")

    async def ask(client: PoolClient) -> None:
        await client.call(SetNodeLimit(node, limit_bytes), Done)

    ask_meta(running_settings(config, sets, state_file), ask)


def unpin(
    pin_id: Annotated[int, typer.Argument(metavar="ID", help="As `stratakv cache pin` told it.")],
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """End one pin before its time; one that is over already is fine."""

    async def ask(client: PoolClient) -> None:
        await client.call(Unpin(pin_id), Done)

    ask_meta(running_settings(config, sets, state_file), ask)
