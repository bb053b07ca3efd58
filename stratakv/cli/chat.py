"""`stratakv chat`: a conversation over the REST API that shows what the cache saves."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from stratakv.cli.options import ConfigOption, SetOption, StateFileOption, running_settings
from stratakv.process import reachable_host
from stratakv.rest_client import Answer, RequestFailed, RestClient
from stratakv.settings import Settings

PROMPT = "you> "


def chat(
    message: Annotated[str | None, typer.Argument(help="Ask this and leave.")] = None,
    model: Annotated[str | None, typer.Option(help="Model to ask; by default the configured one.")] = None,
    url: Annotated[str | None, typer.Option(help="REST address of the DB node.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    state_file: StateFileOption = None,
    config: ConfigOption = None,
    sets: SetOption = None,
) -> None:
    """Talk to a model. An empty line or Ctrl-D ends it, /new starts over."""
    settings = running_settings(config, sets, state_file)
    client = RestClient(
        url or f"http://{reachable_host(settings.rest.host)}:{settings.rest.port}", api_key=settings.rest.api_key
    )
    name = model or _served_model(client, settings)
    opening = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    console = Console()
    while True:
        question = message if message is not None else _read_question()
        if question == "/new":
            history = list(opening)
            continue
        if not question:
            return
        history.append({"role": "user", "content": question})
        try:
            answer = client.chat(
                history, model=name, max_tokens=max_tokens, temperature=temperature, on_text=_print_piece
            )
        except RequestFailed as error:
            if message is not None:
                raise
            history.pop()
            console.print(error.message, style="red", markup=False)
            continue
        history.append({"role": "assistant", "content": answer.text})
        print()
        console.print(_summary(answer), style="dim", markup=False)
        if message is not None:
            return


def _served_model(client: RestClient, settings: Settings) -> str:
    models = [str(entry["id"]) for entry in client.get("/v1/models")["data"]]
    wanted = settings.model.name.rstrip("/").rsplit("/", 1)[-1]
    return wanted if wanted in models or not models else models[0]


def _read_question() -> str:
    try:
        return input(PROMPT).strip()
    except EOFError:
        print()
        return ""


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)


def _summary(answer: Answer) -> str:
    """Time to first token, and how much of the prompt was not computed."""
    prompt = int(answer.usage.get("prompt_tokens", 0))
    generated = int(answer.usage.get("completion_tokens", 0))
    details = answer.usage.get("prompt_tokens_details") or {}
    cached = int(details.get("cached_tokens") or 0)
    speed = f", {(generated - 1) / (answer.total_s - answer.ttft_s):.1f} tokens/s" if generated > 1 else ""
    return (
        f"TTFT {answer.ttft_s * 1000:.0f} ms, {cached} of {prompt} prompt tokens cached, {generated} generated{speed}"
    )
