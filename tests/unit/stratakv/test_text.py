"""Text that grows while tokens arrive equals the text of all tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stratakv.errors import InvalidRequest, SetupError
from stratakv.models import pull
from stratakv.text import (
    PENDING_TOKENS_MAX,
    ChatStyle,
    Detokenizer,
    chat_text,
    decode,
    encode,
    load_tokenizer,
    render_chat,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(pull("smollm2-135m", Path("~/.cache/stratakv").expanduser()))


def byte_tokens(tokenizer: Any) -> list[int]:
    """Tokens of single bytes that are part of longer characters."""
    return [i for i in range(17, 300) if decode(tokenizer, [i]) == "\ufffd"]


def cut_at_stop(text: str, stop: list[str]) -> str:
    """Everything before the stop string that is complete first."""
    for end in range(len(text) + 1):
        found = [end - len(s) for s in stop if text[:end].endswith(s)]
        if found:
            return text[: min(found)]
    return text


def pieces(draw: st.DataObject, ids: list[int]) -> list[list[int]]:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(ids)), max_size=len(ids))))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


def streamed(tokenizer: Any, parts: list[list[int]], stop: list[str]) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    shown = [detokenizer.push(part) for part in parts]
    return [*shown, detokenizer.finish()], detokenizer


@settings(max_examples=300)
@given(data=st.data(), text=st.text(max_size=40), stop=st.lists(st.text("ab é", min_size=1, max_size=4), max_size=3))
def test_any_split_of_any_text_shows_the_same_text(
    tokenizer: Any, data: st.DataObject, text: str, stop: list[str]
) -> None:
    ids = encode(tokenizer, text + "ab abé aab")
    shown, detokenizer = streamed(tokenizer, pieces(data, ids), stop)
    whole = decode(tokenizer, ids)
    assert "".join(shown) == cut_at_stop(whole, stop)
    assert detokenizer.stopped == any(s in whole for s in stop)


@settings(max_examples=300)
@given(data=st.data())
def test_any_split_of_any_tokens_shows_the_same_text(tokenizer: Any, data: st.DataObject) -> None:
    odd = st.sampled_from(byte_tokens(tokenizer))
    ids = data.draw(st.lists(st.one_of(odd, odd, st.integers(0, 50_000)), max_size=60))
    shown, _ = streamed(tokenizer, pieces(data, ids), [])
    assert "".join(shown) == decode(tokenizer, ids)


def test_nothing_shown_is_ever_taken_back(tokenizer: Any) -> None:
    shown, _ = streamed(tokenizer, [[i] for i in encode(tokenizer, "🦀🧑‍🚀 é ok")], [])
    assert "\ufffd" not in "".join(shown)


def test_undecodable_tokens_wait_only_for_a_bounded_number(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer)
    ids = [byte_tokens(tokenizer)[0]] * 1000
    shown = "".join(detokenizer.push([i]) for i in ids)
    assert len(shown) >= 1000 - PENDING_TOKENS_MAX - 1


def test_the_beginning_of_a_stop_string_is_held_back_until_decided(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, ["\nEND"])
    assert detokenizer.push(encode(tokenizer, "ok\nE")) == "ok"
    assert detokenizer.push(encode(tokenizer, "h")) == "\nEh"
    assert detokenizer.push(encode(tokenizer, "\nEND more")) == ""
    assert detokenizer.stopped
    assert detokenizer.push(encode(tokenizer, "more")) + detokenizer.finish() == ""


@settings(max_examples=200)
@given(
    data=st.data(), min_tokens=st.integers(0, 12), stop=st.lists(st.text("ab é", min_size=1, max_size=3), max_size=2)
)
def test_a_stop_string_that_ends_in_the_first_tokens_is_passed_over(
    tokenizer: Any, data: st.DataObject, min_tokens: int, stop: list[str]
) -> None:
    ids = encode(tokenizer, "aab b é aab ab ba éb abba")
    free = decode(tokenizer, ids[:min_tokens])
    whole = decode(tokenizer, ids)
    found = sorted(
        (end, end - len(one))
        for end in range(len(free) + 1, len(whole) + 1)
        for one in stop
        if whole[:end].endswith(one)
    )
    for shows_stop in (False, True):
        detokenizer = Detokenizer(tokenizer, stop, min_tokens=min_tokens, shows_stop=shows_stop)
        shown = "".join([*map(detokenizer.push, pieces(data, ids)), detokenizer.finish()])
        cut = min(found)[0 if shows_stop else 1] if found else len(whole)
        assert shown == whole[:cut]
        assert detokenizer.stopped == bool(found)


def test_special_tokens_are_text_where_that_is_wanted(tokenizer: Any) -> None:
    ids = encode(tokenizer, "a<|im_end|>b")
    assert Detokenizer(tokenizer).push(ids) == "ab"
    assert Detokenizer(tokenizer, skip_special=False).push(ids) == "a<|im_end|>b"
    assert Detokenizer(tokenizer, ["<|im_end|>"], skip_special=False).push(ids) == "a"


def test_chat_is_rendered_by_the_models_template(tokenizer: Any) -> None:
    ids = render_chat(tokenizer, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    text = decode(tokenizer, ids, skip_special=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"role": "robot", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 3}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
    ],
)
def test_a_wrong_message_is_refused_by_the_name_of_its_field(tokenizer: Any, messages: list[Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render_chat(tokenizer, messages)
    assert caught.value.param == field


TALK: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]


def test_a_chat_may_end_in_the_middle_of_its_last_message(tokenizer: Any) -> None:
    text = chat_text(tokenizer, TALK, style=ChatStyle(begins_answer=False, continues_last=True))
    assert text.endswith("<|im_start|>assistant\nWell, ")
    assert chat_text(tokenizer, TALK, style=ChatStyle(begins_answer=False)).endswith("Well, <|im_end|>\n")
    with pytest.raises(InvalidRequest) as caught:
        chat_text(tokenizer, TALK[:1], style=ChatStyle(begins_answer=False, continues_last=True))
    assert caught.value.param == "continue_final_message"


def test_a_template_is_told_only_what_it_uses_and_the_caller_may_set(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    thinks = "{% if thinking is defined and not thinking %}quick{% endif %}{{ messages[0].content }}{{ tokenize }}"
    monkeypatch.setattr(tokenizer, "chat_template", thinks)
    assert chat_text(tokenizer, TALK) == "Hi"
    assert chat_text(tokenizer, TALK, style=ChatStyle(variables={"thinking": False})) == "quickHi"
    for name in ("mood", "messages", "tokenize", "chat_template", "tools", "thinking.x", ""):
        with pytest.raises(InvalidRequest) as caught:
            chat_text(tokenizer, TALK, style=ChatStyle(variables={name: False}))
        assert caught.value.param == f"chat_template_kwargs.{name}"


def deep(levels: int) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for _ in range(levels):
        made = {"a": made}
    return made


def test_what_is_nested_too_deeply_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": deep(5000)}}
    for template in (tokenizer.chat_template, "{{ tools | tojson }}"):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        with pytest.raises(InvalidRequest, match="nested"):
            chat_text(tokenizer, TALK, [tool])


def test_a_directory_without_tokenizer_is_a_setup_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError):
        load_tokenizer(tmp_path)


def test_the_tokenizer_is_the_one_that_transformers_chooses_among_all(tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    chosen = AutoTokenizer.from_pretrained(tokenizer.name_or_path, local_files_only=True)
    assert type(tokenizer) is type(chosen)
    assert tokenizer.init_kwargs == chosen.init_kwargs
    assert tokenizer.all_special_ids == chosen.all_special_ids
    assert tokenizer.backend_tokenizer.to_str() == chosen.backend_tokenizer.to_str()


def test_a_model_that_declares_another_class_gets_that_one(tokenizer: Any, tmp_path: Path) -> None:
    directory = Path(tokenizer.name_or_path)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).symlink_to(directory / name)
    declared = json.loads((directory / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    assert type(load_tokenizer(tmp_path)).__name__.startswith("GPT2Tokenizer")


def test_the_tokenizer_of_the_embedded_model_comes_without_torch(tokenizer: Any) -> None:
    """Importing it costs every DB node two seconds and 250 MB."""
    program = (
        "import sys, pathlib; from stratakv.text import load_tokenizer;"
        " load_tokenizer(pathlib.Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, tokenizer.name_or_path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"
