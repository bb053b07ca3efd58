"""Whatever is added, forked and deleted, each conversation has what was added to it, once, in order."""

from __future__ import annotations

import asyncio

import psycopg
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule, run_state_machine_as_test

from dbnode.conversations.errors import ConversationBusy, ConversationChanged, ConversationNotFound
from dbnode.conversations.store import ConversationStore
from dbnode.conversations.values import KeptTokens, Message, Turn
from dbnode.metadata import Metadata
from stratakv.settings import ConversationsSettings, DatabaseSettings, Secret

TENANT, OTHER = 1, 2
TURN_S = 60.0


@pytest.fixture
def url(migrated_url: str) -> str:
    with psycopg.connect(migrated_url, autocommit=True) as connection:
        connection.execute("INSERT INTO stratakv.tenants (name) VALUES ('other')")
    return migrated_url


class Model(RuleBasedStateMachine):
    """Lists of texts stand for conversations."""

    url = ""
    conversations = Bundle("conversations")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.metadata = Metadata(DatabaseSettings(url=Secret(self.url)))
        self.store = ConversationStore(self.metadata, ConversationsSettings())
        self.texts: dict[str, list[str]] = {}
        self.versions: dict[str, int] = {}
        self.turns: dict[str, Turn] = {}
        self.number = 0

    def teardown(self) -> None:
        self.runner.run(self.metadata.close())
        self.runner.close()

    def said(self) -> Message:
        self.number += 1
        kept = KeptTokens((self.number, self.number + 1), None, 3, b"d") if self.number % 2 else None
        return Message("user", f"text {self.number} \u00fc", kept)

    @rule(target=conversations)
    def create(self) -> str:
        made = self.runner.run(self.store.create(TENANT, {}, [self.said()]))
        self.texts[made.id] = [f"text {self.number} \u00fc"]
        self.versions[made.id] = made.version
        return made.id

    @rule(conversation=conversations, expect=st.sampled_from((None, 0, "now")))
    def add(self, conversation: str, expect: int | str | None) -> None:
        version = self.versions[conversation] if expect == "now" else expect
        message = self.said()
        try:
            assert not isinstance(version, str)
            self.runner.run(self.store.add(TENANT, conversation, [message], version))
        except ConversationBusy:
            assert conversation in self.turns
        except ConversationChanged:
            assert version != self.versions[conversation]
        else:
            assert conversation not in self.turns
            self.texts[conversation].append(message.content)
            self.versions[conversation] += 1

    @rule(conversation=conversations)
    def begin(self, conversation: str) -> None:
        try:
            self.number += 1
            turn = self.runner.run(self.store.begin_turn(TENANT, conversation, f"t{self.number}", TURN_S, None))
        except ConversationBusy:
            assert conversation in self.turns
        else:
            assert conversation not in self.turns
            assert [item.message.content for item in turn.items] == self.texts[conversation]
            self.turns[conversation] = turn

    @rule(conversation=conversations, is_kept=st.booleans())
    def end(self, conversation: str, is_kept: bool) -> None:
        turn = self.turns.pop(conversation, None)
        if turn is None:
            return
        if not is_kept:
            self.runner.run(self.store.give_up_turn(turn))
            return
        messages = [self.said(), self.said()]
        self.runner.run(self.store.end_turn(TENANT, turn, messages))
        self.texts[conversation] += [message.content for message in messages]
        self.versions[conversation] += 1
        again = self.runner.run(self.store.begin_turn(TENANT, conversation, turn.turn_id, TURN_S, None))
        assert again.answer == messages[-1].content

    @rule(target=conversations, origin=conversations, place=st.integers(0, 20))
    def fork(self, origin: str, place: int) -> str:
        texts = self.texts[origin]
        items = self.runner.run(self.store.items(TENANT, origin, None, 100, is_ascending=True))
        place = min(place, len(items) - 1)
        made = self.runner.run(self.store.fork(TENANT, origin, items[place].id, None))
        self.texts[made.id] = texts[: place + 1]
        self.versions[made.id] = made.version
        return made.id

    @rule(conversation=consumes(conversations))
    def delete(self, conversation: str) -> None:
        with pytest.raises(ConversationNotFound):
            self.runner.run(self.store.delete(OTHER, conversation))
        self.runner.run(self.store.delete(TENANT, conversation))
        self.turns.pop(conversation, None)
        del self.texts[conversation]
        with pytest.raises(ConversationNotFound):
            self.runner.run(self.store.get(TENANT, conversation))

    @invariant()
    def each_has_what_was_added(self) -> None:
        for conversation, texts in self.texts.items():
            found = self.runner.run(self.store.get(TENANT, conversation))
            items = self.runner.run(self.store.items(TENANT, conversation, None, 100, is_ascending=True))
            assert [item.message.content for item in items] == texts
            assert (found.num_items, found.version) == (len(texts), self.versions[conversation])
            assert found.size_bytes == sum(len(text.encode()) for text in texts)
        assert {one.id for one in self.runner.run(self.store.newest(TENANT, None, 100))} == self.texts.keys()


def test_conversations_are_what_was_added_to_them(url: str) -> None:
    class Bound(Model):
        def __init__(self) -> None:
            self.url = url
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute("TRUNCATE stratakv.conversations CASCADE")
            super().__init__()

    run_state_machine_as_test(Bound, settings=settings(max_examples=8, stateful_step_count=15))
