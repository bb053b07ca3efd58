"""A document in the system prompt, two questions about it, with the `openai` package: the second one finds the document's KV.

Start `stratakv up` first, then: python examples/openai_client.py
"""

from __future__ import annotations

import os

from openai import OpenAI

DOCUMENT = "\n".join(f"Line {number}: device {number * 37} was checked and found in order." for number in range(1, 101))
QUESTIONS = ("Which lines are there?", "Which device is in line 7?")

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "unused"),
)


def ask(question: str) -> None:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "system", "content": DOCUMENT}, {"role": "user", "content": question}],
        max_tokens=32,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    print(f"> {question}")
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage and chunk.usage.model_extra:
            found = chunk.usage.model_extra["stratakv"]
            print(
                f"\n  {found['computed']} of {chunk.usage.prompt_tokens} prompt tokens computed, {found['ttft_ms']} ms\n"
            )


for question in QUESTIONS:
    ask(question)
