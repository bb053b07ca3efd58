"""Runs one vLLM engine for a benchmark or a test, in vLLM's own environment: commands in by standard input, events out by a pipe.

    python vllm_driver.py FD '{"model": …, engine arguments}'

Commands, one JSON object a line: {"op": "generate", "id", "prompt": [ids], "max_tokens", "salt"}, {"op": "abort", "id"},
{"op": "reset"}. Events: {"ready"}, {"id", "token": first or later ids, "at"}, {"id", "done", "cached", "at"}, {"reset": bool}.
Times are `time.monotonic`, which all processes of a machine share. Knows nothing but vLLM.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any


class Driver:
    """One engine and its requests."""

    def __init__(self, engine: Any, fd: int) -> None:
        self._engine = engine
        self._fd = fd
        self._requests: dict[str, asyncio.Task[None]] = {}

    def tell(self, **event: object) -> None:
        os.write(self._fd, json.dumps(event).encode() + b"\n")

    async def run(self) -> None:
        """Carry out commands until standard input ends."""
        loop = asyncio.get_running_loop()
        commands = asyncio.StreamReader(limit=1 << 26)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
        self.tell(ready=True)
        while line := await commands.readline():
            command = json.loads(line)
            match command["op"]:
                case "generate":
                    self._requests[command["id"]] = asyncio.create_task(self._generate(command))
                case "abort":
                    if command["id"] in self._requests:
                        self._requests[command["id"]].cancel()
                case "reset":
                    self.tell(reset=bool(await self._engine.reset_prefix_cache()))

    async def _generate(self, command: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = command["id"]
        params = SamplingParams(
            temperature=0,
            max_tokens=command["max_tokens"],
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = {"prompt_token_ids": command["prompt"]}
        if command.get("salt"):
            prompt["cache_salt"] = command["salt"]
        cached = 0
        try:
            async for output in self._engine.generate(prompt, params, name):
                cached = output.num_cached_tokens or cached
                self.tell(id=name, tokens=list(output.outputs[0].token_ids), at=time.monotonic())
        except asyncio.CancelledError:
            self.tell(id=name, done="aborted", cached=cached, at=time.monotonic())
        except Exception as error:
            self.tell(id=name, done=f"failed: {error}", cached=cached, at=time.monotonic())
        else:
            self.tell(id=name, done="whole", cached=cached, at=time.monotonic())
        finally:
            self._requests.pop(name, None)


async def main(fd: int, arguments: dict[str, Any]) -> None:
    """Start the engine and serve."""
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    os.set_inheritable(fd, False)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    try:
        await Driver(engine, fd).run()
    finally:
        engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), json.loads(sys.argv[2])))
