"""Statements in statistics: no literal is ever shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbnode.sql.lexer import TokenKind, tokenize
from dbnode.sql.normalise import SHOWN_CHARS_MAX, TEXT_CHARS_MAX, normalised
from dbnode.sql.statements import collectable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("SELECT infer('secret ' || body) FROM t LIMIT 20;", "SELECT infer($1 || body) FROM t LIMIT $2"),
        ("select\n  infer($1 || 'it''s')  -- secret\nfrom t", "select infer($1 || $2) from t"),
        ("SELECT infer(E'a\\'secret' || $2)", "SELECT infer($3 || $2)"),
        ("SELECT infer($q$it's a secret$q$), $$secret$$", "SELECT infer($1), $2"),
        ("SELECT 1.5e-3, .5, 0x1F, 1_000, a1, b.c2", "SELECT $1, $2, $3, $4, a1, b.c2"),
        ("SELECT U&'secret', X'1F', N'secret', \"Odd \"\"Name\"", 'SELECT $1, $2, $3, "Odd ""Name"'),
        ("/* a /* nested */ secret */ SELECT infer(a)", "SELECT infer(a)"),
        ("SELECT a[1:2], b::int, -5", "SELECT a[$1:$2], b::int, -$3"),
        ("SELECT 'a'\n'secret'", "SELECT $1 $2"),
        ("SELECT a$b FROM été", "SELECT a$b FROM été"),
    ],
)
def test_constants_become_parameters(text: str, shown: str) -> None:
    assert normalised(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 'secret",
        'SELECT "secret',
        "SELECT $a$secret$b$",
        "SELECT /* secret",
        "SELECT 'a\\' secret '",
        "SELECT 'a\\', 'secret",
        "SELECT e'secret",
        "SELECT E'secret\\'",
        "x" * (TEXT_CHARS_MAX + 1),
    ],
)
def test_what_cannot_be_read_without_doubt_is_not_shown(text: str) -> None:
    assert normalised(text) is None


def test_a_long_statement_is_cut() -> None:
    shown = normalised(f"SELECT {', '.join(f'column_{i}' for i in range(2000))}, infer(a)")
    assert shown is not None
    assert len(shown) == SHOWN_CHARS_MAX


PLAIN = st.text(alphabet="abz \n-/*$;().1", max_size=20)


@given(PLAIN, st.sampled_from(["'{}'", "E'{}\\''", "$x${}$x$", "E'\\\\{}'", "B'{}'"]), PLAIN)
def test_no_string_is_shown_whatever_is_around_it(before: str, quotes: str, after: str) -> None:
    secret = "Secret Words"
    shown = normalised(before.replace("$", "") + " " + quotes.format(secret) + " " + after)
    assert shown is None or secret not in shown


@given(st.text(alphabet="aE'\"$\\1-/* \n;.", max_size=40))
def test_tokens_cover_the_text_in_order(text: str) -> None:
    end = 0
    try:
        for token in tokenize(text):
            assert end <= token.start < token.end <= len(text)
            end = token.end
            assert token.kind in TokenKind
    except ValueError:
        pass


def test_what_is_remembered_of_a_text_is_each_roles_own() -> None:
    """Else the time that a statement takes would tell whether another role has sent the same one, literals and all."""
    text = "SELECT infer('known to ada')"
    for owner, num_misses in (("ada", 1), ("ada", 0), ("bob", 1)):
        before = normalised.cache_info().misses, collectable.cache_info().misses
        normalised(text, owner)
        collectable(text, frozenset(), owner)
        after = normalised.cache_info().misses, collectable.cache_info().misses
        assert (after[0] - before[0], after[1] - before[1]) == (num_misses, num_misses)
