"""Answers held to a form: always valid, greedy and sampled, whole and continued elsewhere; other requests do not notice."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from stratakv.errors import InvalidRequest
from stratakv.text import decode, encode, load_tokenizer
from tests.unit.workers.engine.harness import TINY, fp32, request, running, save_tiny, submit
from workers.api import parse_completion
from workers.engine import Engine, FinishedEvent, FinishReason
from workers.engine.structured import Form, FormKind, Structures

MAX_TOKENS = 300
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_numbers = count()


def schema(value: Any) -> Form:
    return Form(FormKind.JSON, json.dumps(value))


def choice(*values: str) -> Form:
    return Form(FormKind.CHOICE, json.dumps(values))


def _is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        isinstance(person["name"], str)
        and len(person["name"]) <= 8
        and 0 <= person["age"] <= 150
        and set(person) <= {"name", "age", "tags"}
        and all(tag in "ab" for tag in person.get("tags", []))
    )


ODD = ("no", 'not "sure"', "a\\b", "x\ny", "é☕", "/slash/", "tab\t")
FORMS = [
    pytest.param(schema(PERSON), _is_person, id="object"),
    pytest.param(schema({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}), json.loads, id="array"),
    pytest.param(schema({"type": "integer", "minimum": 7, "maximum": 123}), lambda t: 7 <= int(t) <= 123, id="integer"),
    pytest.param(choice("yes", "no", "not sure"), lambda t: t in ("yes", "no", "not sure"), id="choice"),
    pytest.param(choice(*ODD), lambda t: t in ODD, id="odd-choice"),
    pytest.param(Form(FormKind.REGEX, "[0-9]{4}-[0-9]{2}"), lambda t: re.fullmatch("[0-9]{4}-[0-9]{2}", t), id="regex"),
]  # fmt: skip


class Model:
    """An engine with its tokenizer."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        facts = engine.model.facts
        self.structures = Structures(tokenizer, facts.vocab_size, sorted(facts.eos_token_ids))

    def answer(
        self, form: Form | None, prompt: str, resume: list[int] | None = None, **sampling: Any
    ) -> tuple[list[int], FinishedEvent]:
        how = {"request_id": f"r{next(_numbers)}", "ignore_eos": False, **sampling}
        what = request(encode(self.tokenizer, prompt), how.pop("max_tokens", MAX_TOKENS), resume=resume or (), **how)
        what.structure = None if form is None else self.structures.structure(form, resume or [])
        return submit(self.engine, what).result()

    def text(self, token_ids: list[int]) -> str:
        return decode(self.tokenizer, token_ids)


def _byte_tokenizer(directory: Path) -> Path:
    """Every byte is a token, and a few are joined."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<bos>", "<eos>", *alphabet, "ye", "no", '{"', '":', "12"]
    merges = [("y", "e"), ("n", "o"), ("{", '"'), ('"', ":"), ("1", "2")]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")
    fast.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, and a vocabulary longer than the tokenizer's, as models pad it."""
    directory = save_tiny(tmp_path_factory.mktemp("bytes"), LlamaConfig(**{**TINY, "vocab_size": 272}))
    return _byte_tokenizer(directory)


@pytest.fixture(scope="module")
def tiny_model(tiny_bytes: Path) -> Iterator[Model]:
    with running(fp32(tiny_bytes, num_blocks=256)) as engine:
        yield Model(engine, load_tokenizer(tiny_bytes))


@pytest.fixture(scope="module")
def other_model(tiny_bytes: Path) -> Iterator[Model]:
    """The same model in another engine."""
    with running(fp32(tiny_bytes, num_blocks=256)) as engine:
        yield Model(engine, load_tokenizer(tiny_bytes))


@pytest.fixture(scope="module")
def real_model(smollm2: Path) -> Iterator[Model]:
    with running(fp32(smollm2, num_blocks=256)) as engine:
        yield Model(engine, load_tokenizer(smollm2))


@pytest.mark.parametrize(("form", "is_valid"), FORMS)
def test_answer_is_valid_greedy_and_sampled(tiny_model: Model, form: Form, is_valid: Any) -> None:
    for sampling in (
        {},
        *({"temperature": 1.0, "seed": seed} for seed in range(6)),
        {"temperature": 2.0, "top_p": 0.5},
    ):
        tokens, end = tiny_model.answer(form, "x", **sampling)
        assert end.reason is FinishReason.STOP, (end, tiny_model.text(tokens))
        assert is_valid(tiny_model.text(tokens)), (sampling, tiny_model.text(tokens))


@pytest.mark.parametrize(("form", "is_valid"), FORMS)
def test_real_model_gives_a_valid_answer(real_model: Model, form: Form, is_valid: Any) -> None:
    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        tokens, end = real_model.answer(form, "Tell me about John, who is 30 years old.\n", **sampling)
        assert end.reason is FinishReason.STOP
        assert is_valid(real_model.text(tokens)), real_model.text(tokens)


@pytest.mark.parametrize(("form", "is_valid"), FORMS)
def test_answer_is_the_same_wherever_another_engine_goes_on_with_it(
    tiny_model: Model, other_model: Model, form: Form, is_valid: Any
) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 11}
    whole, _ = tiny_model.answer(form, "x", **sampling)
    for cut in {*range(1, len(whole), 1 + len(whole) // 8), len(whole)}:
        first, end = tiny_model.answer(form, "x", max_tokens=cut, **sampling)
        assert first == whole[:cut]
        rest, end = other_model.answer(form, "x", resume=first, **sampling)
        assert (first + rest, end.reason) == (whole, FinishReason.STOP)


def test_last_token_of_a_form_ends_the_answer_and_a_cut_one_is_told(tiny_model: Model) -> None:
    tokens, end = tiny_model.answer(choice("12"), "x", max_tokens=1)
    assert (tiny_model.text(tokens), end.reason, end.stop_token_id) == ("12", FinishReason.STOP, None)
    _, end = tiny_model.answer(schema(PERSON), "x", max_tokens=3)
    assert end.reason is FinishReason.LENGTH


def test_eos_that_is_ignored_still_ends_a_form(tiny_model: Model) -> None:
    tokens, end = tiny_model.answer(choice("1", "111"), "x", ignore_eos=True, temperature=1.0, seed=2)
    assert end.reason is FinishReason.STOP
    assert tiny_model.text(tokens) in ("1", "111")


def test_other_requests_of_the_same_steps_get_what_they_get_alone(tiny_model: Model) -> None:
    alone = [tiny_model.answer(None, f"plain {i}", max_tokens=20)[0] for i in range(3)]
    formed, listeners = [], []
    for i in range(3):
        for form in (schema(PERSON), None):
            what = request(encode(tiny_model.tokenizer, f"plain {i}"), 20, request_id=f"m{i}{form}", ignore_eos=False)
            what.structure = None if form is None else tiny_model.structures.structure(form)
            (listeners if form is None else formed).append(submit(tiny_model.engine, what))
    assert [listener.result()[0] for listener in listeners] == alone
    assert all(tiny_model.text(listener.result()[0]).startswith('{"name": "') for listener in formed)


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        (schema({"type": "objct"}), "objct"),
        (schema({"type": "string", "minLength": -1}), "minLength"),
        (schema({"not": {"type": "string"}}), "not"),
        (schema({"$ref": "#/nowhere"}), "nowhere"),
        (Form(FormKind.JSON, "[" * 500 + "]" * 500), "recursion"),
        (Form(FormKind.REGEX, "(a"), "unclosed"),
        (Form(FormKind.REGEX, "(?=a)b"), "look-ahead"),
    ],
)
def test_form_that_cannot_be_used_is_refused_and_says_why(tiny_model: Model, form: Form, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        tiny_model.structures.structure(form)
    assert caught.value.param == f"structured_outputs.{form.kind.value}"
    assert caught.value.sqlstate == "22023"


def test_compiled_forms_are_found_by_requests_with_the_same_salt_only(tiny_model: Model) -> None:
    structures = tiny_model.structures
    structures._compiled.clear()
    compiled = []
    for salt in ("ada", "ada", "bob", None):
        structures.structure(choice("yes", "no"), salt=salt)
        compiled.append(len(structures._compiled))
    assert compiled == [1, 1, 2, 3]


def test_form_that_grows_too_large_on_the_way_fails_its_own_request_only(tiny_model: Model) -> None:
    explosive = schema({"type": "object", "properties": {f"key{i}": {} for i in range(2000)}})
    plain = tiny_model.answer(None, "plain", max_tokens=20)[0]
    for _ in range(2):
        tokens, end = tiny_model.answer(explosive, "x")
        assert (end.reason, end.stop_token_id) == (FinishReason.ERROR, None)
        assert isinstance(end.error, InvalidRequest)
        assert len(tokens) < MAX_TOKENS
    assert tiny_model.answer(None, "plain", max_tokens=20)[0] == plain
    assert tiny_model.engine.failure is None


def test_tokens_that_do_not_fit_the_form_are_refused(tiny_model: Model) -> None:
    with pytest.raises(InvalidRequest, match="structured_outputs"):
        tiny_model.structures.structure(choice("yes"), encode(tiny_model.tokenizer, "maybe"))


def _form(body: bytes) -> Form:
    outputs = parse_completion(body).structured_outputs
    assert outputs is not None
    return outputs.form()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "got 0"),
        ({"choice": ["a"], "regex": "a"}, "got 2"),
        ({"choice": []}, "1 to 1000"),
        ({"choice": ["a", ""]}, "empty"),
        ({"regex": "a" * 70_000}, "longer"),
        ({"grammar": "x"}, "grammar"),
        ({"json": "x"}, "json"),
    ],
)
def test_field_of_the_http_body_is_checked_by_name(given: dict[str, Any], problem: str) -> None:
    body = json.dumps({"prompt": [1], "structured_outputs": given}).encode()
    with pytest.raises(InvalidRequest, match=problem):
        _form(body)


def test_order_of_a_schemas_properties_is_kept() -> None:
    body = b'{"prompt": "x", "structured_outputs": {"json": {"properties": {"b": {}, "a": {}}}}}'
    assert _form(body) == Form(FormKind.JSON, '{"properties":{"b":{},"a":{}}}')
