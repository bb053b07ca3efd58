"""What of the SGLang integration needs no SGLang: options, namespaces, keys, hit policies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stratakv.errors import SetupError
from stratakv.integrations.sglang.hits import Policy, restorable
from stratakv.integrations.sglang.options import Options, parse_options
from stratakv.integrations.sglang.scope import Ranks, ServerScope, page_key, weights_of
from stratakv.layout import KVLayout

LAYOUT = KVLayout.for_attention(
    num_layers=2, num_kv_heads=1, head_dim=8, page_tokens=4, dtype="bfloat16", element_bytes=2
)
DECLARED = "ab" * 16
COMMIT = "c0" * 20


def scope(**options: str) -> ServerScope:
    return ServerScope("weights", "dtype=auto", Options(**options))  # type: ignore[arg-type]


def test_keys_of_sglang_itself_are_no_options_of_ours() -> None:
    extra = {"backend_name": "stratakv", "module_path": "m", "class_name": "c", "interface_v1": 1, "namespace": "n"}
    assert parse_options(extra) == Options(namespace="n")
    assert parse_options(None) == Options()


@pytest.mark.parametrize("wrong", [{"mata": "tcp://h:1"}, {"lookup_timeout_s": 0}, {"namespace_id": "12"}])
def test_a_mistake_in_the_extra_config_is_told_at_the_start(wrong: dict[str, object]) -> None:
    with pytest.raises(SetupError, match=r"extra config: .*"):
        parse_options(wrong)


def test_everything_that_changes_kv_bytes_changes_the_namespace() -> None:
    ranks = Ranks()
    spaces = [
        scope().namespace("kv", LAYOUT, ranks),
        scope(namespace="tenant").namespace("kv", LAYOUT, ranks),
        replace(scope(), weights="others").namespace("kv", LAYOUT, ranks),
        replace(scope(), numerics="quantization=fp8").namespace("kv", LAYOUT, ranks),
        scope().namespace("draft", LAYOUT, ranks),
        scope().namespace("kv", replace(LAYOUT, dtype="float16"), ranks),
        scope().namespace("kv", replace(LAYOUT, page_tokens=8), ranks),
        scope().namespace("kv", LAYOUT, replace(ranks, tp_size=2)),
        scope().namespace("kv", LAYOUT, replace(ranks, tp_size=2, tp_rank=1)),
        scope().namespace("kv", LAYOUT, replace(ranks, pp_size=2)),
        scope().namespace("kv", LAYOUT, replace(ranks, cp_size=2)),
        scope().namespace("kv", LAYOUT, replace(ranks, dcp_size=2)),
    ]
    assert len(set(spaces)) == len(spaces)
    assert scope().namespace("kv", LAYOUT, replace(ranks, tp_size=2, tp_rank=1).replicated()) == spaces[0]


def test_a_declared_namespace_is_taken_as_it_is_and_only_for_whole_pages_of_kv() -> None:
    declared = scope(namespace_id=DECLARED)
    spaces = [
        declared.namespace("kv", LAYOUT, Ranks()),
        declared.namespace("mamba", LAYOUT, Ranks()),
        declared.namespace("kv", LAYOUT, Ranks(tp_rank=0, tp_size=2)),
        declared.namespace("kv", LAYOUT, Ranks(tp_rank=1, tp_size=2)),
    ]
    assert spaces[0].hex() == DECLARED
    assert len(set(spaces)) == len(spaces)


def test_weights_are_what_was_declared_else_what_is_on_this_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert weights_of(Options(model_revision="r7"), str(tmp_path), "") == "r7"
    for unknown in ("org/not-on-this-host", ""):
        with pytest.raises(SetupError, match="cannot tell which weights"):
            weights_of(Options(), unknown, "")
    with pytest.raises(SetupError, match="holds no model"):
        weights_of(Options(), str(tmp_path), "")
    snapshot = tmp_path / "hub" / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert weights_of(Options(), "org/model", "") == f"org/model@{COMMIT}"
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = weights_of(Options(), str(tmp_path), "")
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert weights_of(Options(), str(tmp_path), "") != before


def test_sglangs_hashes_are_keys_as_they_are() -> None:
    assert page_key("0f" * 32).hex() == "0f" * 32
    assert len({page_key(text) for text in ("0f" * 31, "no hash", "")}) == 3
    assert all(len(page_key(text)) == 32 for text in ("0f" * 31, "no hash"))


@given(present=st.lists(st.booleans(), max_size=12), window=st.integers(0, 5))
def test_a_length_is_restorable_if_the_pages_its_policy_names_are_there(present: list[bool], window: int) -> None:
    lengths = range(1, len(present) + 1)
    assert restorable(Policy.ALL_PAGES, present, window) == {n for n in lengths if all(present[:n])}
    assert restorable(Policy.TRAILING_PAGES, present, window) == {
        n for n in lengths if all(present[max(0, n - max(window, 1)) : n])
    }
