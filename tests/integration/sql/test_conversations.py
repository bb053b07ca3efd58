"""infer_chat(): turns in SQL, each once, never ahead of the statement, and by the tenant of the login."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from prometheus_client import CollectorRegistry

from dbnode.conversations.metrics import ConversationMetrics
from dbnode.conversations.service import Conversations
from dbnode.conversations.store import ConversationStore
from dbnode.generate import Chunk, FinishReason, GenerateRequest
from dbnode.metadata import Metadata
from dbnode.prompt_tokens import PromptTokens
from dbnode.sql_conversations import SqlConversations
from dbnode.tenants.directory import Directory
from stratakv import migrate
from stratakv.models import DEFAULT_MODEL, pull
from stratakv.models.store import resolve
from stratakv.postgres import EmbeddedPostgres
from stratakv.settings import ConversationsSettings, DatabaseSettings, Secret
from stratakv.sqlfunctions import install, uninstall
from stratakv.text import load_tokenizer
from tests.integration.dbnode.running_node import CACHE_DIR
from tests.integration.sql.harness import FrontThread, ReversingModel, address_in, front_thread

ROLES = ("chat_acme", "chat_bolt")
SEED = """
    INSERT INTO stratakv.tenants (name) VALUES ('acme'), ('bolt');
    INSERT INTO stratakv.tenant_roles (cluster, role_name, role_oid, tenant_id)
        SELECT c.system_identifier::text, r.rolname, r.oid, t.id FROM pg_control_system() c, pg_roles r, stratakv.tenants t
        WHERE r.rolname = 'chat_' || t.name
"""
Connection = psycopg.Connection[tuple[Any, ...]]


class Echo:
    """In the place of the inference service: answers by how many tokens it was asked with."""

    def __init__(self, tokens: PromptTokens) -> None:
        self.tokens = tokens
        self.requests: list[GenerateRequest] = []

    def check_allowed(self, request: GenerateRequest) -> None:
        """Everything is."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        self.requests.append(request)
        assert isinstance(request.prompt, tuple)
        text = f"{len(self.requests)}"
        yield Chunk(text, tuple(await self.tokens.of_text(text, special=False)), FinishReason.STOP)


class ChatFront:
    """A face whose conversations are in a database of their own."""

    def __init__(self, thread: FrontThread, echo: Echo, cluster: EmbeddedPostgres) -> None:
        self.thread, self.echo, self.cluster = thread, echo, cluster


@pytest.fixture(scope="module")
def chat(cluster: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatFront]:
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE chat_meta")
        for role in ROLES:
            admin.execute(f"CREATE ROLE {role} LOGIN".encode())
    url = cluster.database_url("chat_meta")
    migrate.upgrade(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SEED.encode())
    directory = tmp_path_factory.mktemp("skv")
    directory.chmod(0o711)
    for parent in directory.parents:
        with suppress(PermissionError):
            parent.chmod(parent.stat().st_mode | 0o111)
    pull(DEFAULT_MODEL, CACHE_DIR)
    settings = DatabaseSettings(url=Secret(url))
    metadata, tenants = Metadata(settings), Directory(settings)
    echo = Echo(PromptTokens(load_tokenizer(resolve(DEFAULT_MODEL, CACHE_DIR))))
    counts = ConversationMetrics(CollectorRegistry())
    conversations = Conversations(ConversationStore(metadata, ConversationsSettings()), echo, 60.0, counts)  # type: ignore[arg-type]
    topics = SqlConversations(conversations, tenants).topics()
    with front_thread(cluster, directory, ReversingModel(), topics=topics) as thread:
        thread.run(tenants.load())
        yield ChatFront(thread, echo, cluster)
        thread.run(metadata.close())
    echo.tokens.close()
    with psycopg.connect(cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("DROP DATABASE chat_meta WITH (FORCE)")
        for role in ROLES:
            admin.execute(f"DROP ROLE {role}".encode())


@pytest.fixture
def database(chat: ChatFront) -> Iterator[str]:
    with psycopg.connect(chat.cluster.database_url("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE chat_data")
        install(chat.cluster.database_url("chat_data"), address_in(chat.thread.settings.listener_dir))  # type: ignore[arg-type]
        chat.echo.requests.clear()
        chat.thread.model.calls.clear()
        yield "chat_data"
        admin.execute("DROP DATABASE chat_data WITH (FORCE)")


@pytest.fixture
def acme(chat: ChatFront, database: str) -> Iterator[Connection]:
    with psycopg.connect(chat.thread.url(database, "chat_acme"), autocommit=True) as connection:
        yield connection


def value(connection: Connection, query: str, *parameters: object) -> Any:
    row = connection.execute(query.encode(), parameters or None).fetchone()
    assert row is not None
    return row[0]


def said(connection: Connection, conversation: str) -> list[tuple[Any, ...]]:
    query = "SELECT role, content FROM stratakv.conversation_items(%s) ORDER BY position"
    return connection.execute(query, (conversation,)).fetchall()


def test_each_turn_has_what_was_said_before(acme: Connection, chat: ChatFront) -> None:
    conversation = value(acme, "SELECT stratakv.create_conversation('You count.', '{\"topic\": \"x\"}')")
    assert value(acme, "SELECT infer_chat(%s, 'How many?')", conversation) == "1"
    options = '{"max_tokens": 5, "temperature": 1}'
    assert value(acme, "SELECT stratakv.infer_chat(%s, 'And now?', %s)", conversation, options) == "2"
    assert said(acme, conversation) == [
        ("system", "You count."),
        ("user", "How many?"),
        ("assistant", "1"),
        ("user", "And now?"),
        ("assistant", "2"),
    ]
    first, second = (request.prompt for request in chat.echo.requests)
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    assert second[: len(first)] == first
    sampling = chat.echo.requests[1].sampling
    assert (sampling.max_tokens, sampling.temperature) == (5, 1.0)
    fork = value(acme, "SELECT stratakv.fork_conversation(%s)", conversation)
    assert value(acme, "SELECT stratakv.delete_conversation(%s)", conversation) is True
    assert len(said(acme, fork)) == 5


def test_a_statement_takes_each_of_its_turns_once(acme: Connection, chat: ChatFront) -> None:
    """Also where it calls infer() as well, which is looked ahead for otherwise."""
    made = [value(acme, "SELECT stratakv.create_conversation()") for _ in range(3)]
    rows = acme.execute(
        "SELECT infer('p' || n), infer_chat(c, 'q' || n) FROM unnest(%s::text[]) WITH ORDINALITY AS t(c, n)", (made,)
    ).fetchall()
    assert [row[0] for row in rows] == ["1p", "2p", "3p"]
    assert len(chat.echo.requests) == 3
    for number, conversation in enumerate(made, 1):
        assert said(acme, conversation)[0] == ("user", f"q{number}")
        assert len(said(acme, conversation)) == 2


def test_a_turn_that_a_view_hides_is_not_taken_ahead(acme: Connection, chat: ChatFront) -> None:
    conversation = value(acme, "SELECT stratakv.create_conversation()")
    acme.execute(
        f"CREATE TEMP VIEW hidden AS SELECT stratakv.infer('x') AS a, stratakv.infer_chat('{conversation}', 'q') AS b".encode()
    )
    for expected in ("1", "2"):
        assert acme.execute("SELECT * FROM hidden").fetchone() == ("x", expected)
    assert len(said(acme, conversation)) == 4


def test_explain_and_null_take_no_turn(acme: Connection, chat: ChatFront) -> None:
    conversation = value(acme, "SELECT stratakv.create_conversation()")
    acme.execute(f"EXPLAIN SELECT infer_chat('{conversation}', 'q')".encode())
    assert value(acme, "SELECT infer_chat(NULL, 'q')") is None
    assert value(acme, "SELECT infer_chat(%s, NULL)", conversation) is None
    with pytest.raises(psycopg.errors.FeatureNotSupported):
        acme.execute(f"SELECT stratakv.explain($$SELECT infer_chat('{conversation}', 'q')$$)".encode())
    assert said(acme, conversation) == []


def test_another_tenants_conversation_is_as_if_it_were_not_there(
    acme: Connection, chat: ChatFront, database: str
) -> None:
    conversation = value(acme, "SELECT stratakv.create_conversation('secret')")
    with psycopg.connect(chat.thread.url(database, "chat_bolt"), autocommit=True) as bolt:
        for call in (
            "infer_chat(%s, 'q')",
            "fork_conversation(%s)",
            "delete_conversation(%s)",
            "conversation_items(%s)",
        ):
            messages = []
            for asked in (conversation, "conv_" + "0" * 48):
                with pytest.raises(psycopg.errors.UndefinedObject) as refused:
                    bolt.execute(f"SELECT stratakv.{call}".encode(), (asked,))
                messages.append(str(refused.value).replace(asked, "ID"))
            assert messages[0] == messages[1]
    assert said(acme, conversation) == [("system", "secret")]


@pytest.mark.parametrize("option", ["system", "on_error", "dedupe", "nonsense", "@json_schema"])
def test_options_that_say_nothing_of_a_turn_are_refused_by_name(acme: Connection, option: str) -> None:
    conversation = value(acme, "SELECT stratakv.create_conversation()")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"unknown option {option}"):
        acme.execute("SELECT infer_chat(%s, 'q', jsonb_build_object(%s::text, 'x'))", (conversation, option))


def test_nothing_is_left_by_uninstalling(chat: ChatFront, database: str) -> None:
    url = chat.cluster.database_url(database)
    uninstall(url)
    with psycopg.connect(url) as connection:
        found = connection.execute("SELECT proname FROM pg_proc WHERE proname ~ 'infer_chat|conversation'").fetchall()
    assert found == []
