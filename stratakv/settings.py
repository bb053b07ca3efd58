"""Every setting of every process: one frozen dataclass per section, gathered in `Settings`.

Read by `stratakv.config.load_settings` from defaults, a TOML file, the environment and flags; nothing else reads them.
A field's `doc` becomes the help of its flag and its line in the configuration reference.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NewType

from stratakv.wire import WorkerRole

Secret = NewType("Secret", str)
"""Shown as `***` wherever settings are shown."""
Bytes = NewType("Bytes", int)
"""A size; may be written as 512MiB or 2GiB."""
WorkerAddress = NewType("WorkerAddress", str)
"""As `stratakv.worker_address` reads it."""


class EvictionPolicy(enum.StrEnum):
    """Which pages of a full segment go first (`meta_server.policies`)."""

    COST = "cost"
    LRU = "lru"
    LFU = "lfu"
    S3FIFO = "s3fifo"


class RouterPolicy(enum.StrEnum):
    """How the worker for a request is chosen (`dbnode.scheduler.policies`)."""

    COST = "cost"
    PREFIX = "prefix"
    LEAST_LOAD = "least_load"
    ROUND_ROBIN = "round_robin"
    DYNAMO = "dynamo"
    AIBRIX = "aibrix"


class TlsMode(enum.StrEnum):
    """What the DB node does when a PostgreSQL client asks for TLS."""

    DISABLE = "disable"
    ALLOW = "allow"
    """Give it, if there is a certificate."""
    REQUIRE = "require"
    """And let nobody in without."""
    PASSTHROUGH = "passthrough"
    """Let PostgreSQL give it; what goes through is not seen."""


MIB = 1024 * 1024
GIB = 1024 * MIB


def setting(default: Any, doc: str) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, slots=True)
class DatabaseSettings:
    """[database] where the metadata lives."""

    url: Secret | None = setting(None, "PostgreSQL URL of the metadata; without it `stratakv up` runs an embedded one")
    connect_timeout_s: float = setting(10.0, "give up connecting after so long")
    pool_connections_max: int = setting(4, "connections one process keeps")


@dataclass(frozen=True, slots=True)
class PostgresSettings:
    """[postgres] the embedded PostgreSQL; its data are below `up.data_dir`, it is reached by a private Unix socket only."""

    bin: Path | None = setting(None, "directory with initdb and postgres of another installation (>= 15)")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """[model] where models are kept and which one is served."""

    name: str = setting("smollm2-135m", "model to serve: a pulled name, hf://org/name or a local directory")
    cache_dir: Path = setting(Path("~/.cache/stratakv"), "where pulled models are kept")


@dataclass(frozen=True, slots=True)
class MetaSettings:
    """[meta] the meta server, and where others find it."""

    host: str = setting("127.0.0.1", "address to listen on, and where others find it")
    public_host: str = setting("", "where others reach it; by default `host`")
    native_port: int = setting(6383, "port of the native protocol")
    events_port: int = setting(0, "port of the events; 0: any free one, which clients are told")
    addresses: tuple[str, ...] = setting(
        (), "host:port of every meta server, where there are several; by default the one at `host`"
    )
    shards: tuple[str, ...] = setting(
        (), "host:port+host:port of each shard's meta servers, where namespaces are spread over several leaders"
    )
    leader_lease_s: float = setting(5.0, "a leader that is not heard of for so long is replaced by one that stands by")
    slow_call_s: float = setting(0.25, "calls that take so long are logged; 0: none")
    metrics_port: int = setting(0, "port of the pool's Prometheus metrics (HTTP, `/metrics`); 0: none")
    heartbeat_s: float = setting(1.0, "how often daemons and workers report; three misses and they count as gone")
    node_silence_s_max: float = setting(
        86_400.0, "a daemon that is silent for so long does not come back: its pages in memory are forgotten"
    )
    lease_s_max: float = setting(60.0, "longest read lease granted")
    put_timeout_s_max: float = setting(120.0, "longest time a put may stay unfinished")
    puts_pending_max: int = setting(10_000, "puts in progress at once")
    leases_max: int = setting(100_000, "read leases at once")
    pins_max: int = setting(10_000, "pinned prefixes at once")
    request_timeout_s: float = setting(2.0, "clients give up on one request after so long")
    reclaim_high: float = setting(0.95, "share of a segment in use at which the coldest pages are reclaimed")
    reclaim_low: float = setting(0.85, "share of a segment in use at which reclaiming stops")
    policy: EvictionPolicy = setting(EvictionPolicy.COST, "which pages go first: cost, lru, lfu or s3fifo")
    demote_high: float = setting(0.80, "share of a memory segment in use at which its coldest pages go to its disk")
    demote_low: float = setting(0.70, "share of a memory segment in use down to which they go")
    replicas_max: int = setting(1, "daemons at which a page that is read often may lie at once; 1: none is copied")
    replica_reads: int = setting(3, "a page that was read so often from another daemon's host is copied there")
    embedded_postgres: Path | None = setting(
        None, "directory of a PostgreSQL that runs while the meta server does, instead of the one at database.url"
    )
    kvcm_enabled: bool = setting(False, "serve the KVCM API too; by default if one of its ports is given")
    kvcm_host: str = setting("127.0.0.1", "address the KVCM API listens on")
    kvcm_token: Secret | None = setting(
        None, "token that clients of the KVCM API may send; needed to listen beyond this machine"
    )
    kvcm_user: str = setting("", "account by which `stratakv meta` asks; by default it sends the token")
    kvcm_password: Secret | None = setting(None, "its password")
    kvcm_tls_cert: Path | None = setting(
        None, "certificate of the KVCM API's ports, and its chain (PEM); needed to listen beyond this machine"
    )
    kvcm_tls_key: Path | None = setting(None, "its key (PEM)")
    kvcm_tls_ca: Path | None = setting(
        None, "roots by which `stratakv meta` knows the meta server (PEM); by default the certificate itself"
    )
    kvcm_grpc_port: int = setting(6381, "port of the KVCM API, gRPC; 0: none")
    kvcm_http_port: int = setting(6382, "port of the KVCM API, HTTP; 0: none")
    admin_grpc_port: int = setting(6491, "port of the KVCM API's admin service, gRPC; 0: none")
    admin_http_port: int = setting(6492, "port of the KVCM API's admin service, HTTP; 0: none")
    kvcm_probe_s: float = setting(10.0, "how often the KVCM API looks whether its storages are well")
    kvcm_host_timeout_s: float = setting(30.0, "hosts that report to the KVCM API and are silent for so long are gone")
    kvcm_reported_blocks_max: int = setting(10_000_000, "blocks that the hosts of one instance report at once")
    debug_service: bool = setting(False, "let clients of the admin ports inject faults into the KVCM API")
    kvcm_file_dir: Path = setting(
        Path("~/.local/share/stratakv/kvcm"), "root of the KVCM API's first storage, which its clients write into"
    )


class TransferProtocol(enum.StrEnum):
    """What Mooncake's Transfer Engine moves bytes by."""

    OFF = "off"
    TCP = "tcp"
    RDMA = "rdma"


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """[pool] what all members of a pool share."""

    secret: Secret | None = setting(
        None, "shows meta server, daemons, workers and DB nodes that they belong together; needed beyond this machine"
    )
    shared_memory: bool = setting(True, "let workers reach the daemons of their own host through shared memory")
    transfer_engine: TransferProtocol = setting(
        TransferProtocol.OFF, "let Mooncake's Transfer Engine move pages between hosts: off, tcp or rdma"
    )


@dataclass(frozen=True, slots=True)
class DmpSettings:
    """[dmp] one memory-pool daemon."""

    node: str = setting("dmp-0", "name of this daemon, unique in the pool")
    shard_number: int = setting(0, "which of meta.shards it belongs to, from 0")
    host: str = setting("127.0.0.1", "address to listen on")
    public_host: str = setting("", "where others reach it; by default `host`, which must be given for all addresses")
    port: int = setting(6390, "port of the TCP transport")
    segment_bytes: Bytes = setting(Bytes(512 * MIB), "memory this daemon gives to the pool")
    connections_max: int = setting(256, "connections at once")
    idle_timeout_s: float = setting(300.0, "close a connection that is silent for so long")
    disk_dir: Path | None = setting(None, "directory of the disk tier, in which each daemon has one of its own")
    disk_bytes: Bytes = setting(Bytes(4 * GIB), "disk this daemon gives to the pool, where there is a disk_dir")
    disk_file_bytes: Bytes = setting(Bytes(256 * MIB), "files of the disk tier are so long")
    disk_fsync: bool = setting(True, "wait for the disk before a page counts as written")
    disk_scrub_bytes_per_s: Bytes = setting(
        Bytes(8 * MIB), "rate at which pages on disk are read and checked; 0 for never"
    )


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """[worker] one inference worker."""

    name: str = setting("", "name of this worker, unique; by default made from role and port")
    role: WorkerRole = setting(WorkerRole.BOTH, "what the router prefers it for: prefill, decode or both")
    host: str = setting("127.0.0.1", "address to listen on")
    public_host: str = setting("", "where DB nodes reach it; by default `host`, which must be given for all addresses")
    port: int = setting(8100, "HTTP port")
    events_port: int = setting(
        0, "ZeroMQ port on which it tells which blocks it holds, and the next one for replays; 0 takes free ones"
    )
    dtype: str = setting("bf16", "bf16, fp32 or fp16; the last is for GPUs that have no bf16")
    device: str = setting("auto", "auto, cpu or cuda")
    threads: int = setting(0, "CPU threads of the engine; 0 takes all cores")
    block_size: int = setting(16, "tokens in a block")
    l1_tokens: int = setting(32_768, "tokens the paged cache in device memory holds")
    node: str = setting("", "name of the local memory-pool daemon; without one the worker has no L2")
    max_running: int = setting(64, "sequences decoded at once")
    max_waiting: int = setting(1024, "requests queued before more are refused")
    max_batched_tokens: int = setting(4096, "tokens computed in one step at most")
    pool_enabled: bool = setting(True, "use the memory pool (L2 and L3)")
    load_timeout_s: float = setting(5.0, "recompute what the pool has not delivered after so long")
    load_ahead_requests: int = setting(4, "queued requests whose blocks are loaded before their turn; 0: none")
    load_ahead_bytes: Bytes = setting(Bytes(512 * MIB), "room in the paged cache for what is loaded so")
    journal_dir: Path | None = setting(
        None, "directory in which it writes down what each request took, for tenants' quotas; without one, nowhere"
    )
    profile_s: float = setting(
        5.0, "longest time a worker measures itself for at its start, where no fresh profile is kept; 0: never"
    )


@dataclass(frozen=True, slots=True)
class SqlSettings:
    """[sql] the DB node's PostgreSQL face."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(6432, "port that PostgreSQL clients connect to")
    backend_url: Secret | None = setting(None, "PostgreSQL whose bytes are relayed; by default the one of the metadata")
    backend_trusted: bool = setting(
        False,
        "relay sessions that PostgreSQL lets in without credentials; only for the embedded one on a loopback address",
    )
    backend_uid: int | None = setting(
        None, "uid of PostgreSQL's processes, the only ones let in at the private Unix socket; by default found by name"
    )
    listener_dir: Path | None = setting(None, "directory of the private Unix socket that infer() calls back to")
    listener_host: str = setting("127.0.0.1", "address infer() calls back to when there is no listener_dir")
    listener_port: int = setting(6433, "its port; with listener_dir only part of the socket's name")
    listener_key: Secret | None = setting(
        None, "key PostgreSQL shows there; with listener_dir one is made and kept in it"
    )
    admin_database: str = setting(
        "stratakv_admin", "name under which clients reach the admin database, which only answers SHOW; empty: none"
    )
    listener_tls: bool | None = setting(
        None, "TLS at that address (not in listener_dir); by default unless it is a loopback address"
    )
    tls_mode: TlsMode = setting(
        TlsMode.ALLOW, "TLS with clients: disable, allow, require, or passthrough (PostgreSQL's own, without hints)"
    )
    tls_cert: Path | None = setting(None, "certificate shown to clients, and its chain (PEM)")
    tls_key: Path | None = setting(None, "its key (PEM)")
    auth_file: Path | None = setting(
        None, "users and their SCRAM verifiers, whom the DB node authenticates itself (PgBouncer's format)"
    )
    clients_max: int = setting(500, "client connections at once")
    client_idle_timeout_s: float = setting(
        0.0, "end sessions that are idle outside a transaction for so long; 0: never"
    )
    startup_timeout_s: float = setting(30.0, "a client must finish logging in within so long")
    drain_grace_s: float = setting(10.0, "statements still running after a SIGTERM get so long")
    prompt_bytes_max: Bytes = setting(Bytes(4 * MIB), "longest prompt infer() takes")
    calls_waiting_max: int = setting(4096, "infer() calls in progress at once")
    hints: bool = setting(True, "look ahead for the infer() calls of a statement, to run them together")
    hints_budget_s: float = setting(2.0, "longest time of a statement that is spent on looking ahead")
    hints_window: int = setting(32, "prompts looked for at first where a statement may stop early; doubled each time")
    order_budget_s: float = setting(
        1.0,
        "longest time a pass of looking ahead spends on the order of fields in infer_row(); 0: prompts and fields as they come",
    )
    hints_bytes_max: Bytes = setting(Bytes(64 * MIB), "prompts of one statement that are looked ahead for")
    memo_ttl_s: float = setting(
        30.0, "how long the answers of a failed transaction are kept for its retry; 0: not at all"
    )
    memo_entries_max: int = setting(100_000, "answers that a transaction shares, and that are kept of failed ones")
    memo_bytes_max: Bytes = setting(Bytes(64 * MIB), "the same, in bytes of prompts and answers")


@dataclass(frozen=True, slots=True)
class RestSettings:
    """[rest] the DB node's OpenAI-compatible face."""

    host: str = setting("127.0.0.1", "address to listen on")
    port: int = setting(8000, "port that OpenAI clients connect to")
    api_key: Secret | None = setting(None, "key that clients must send; needed to listen beyond this machine")
    body_bytes_max: Bytes = setting(Bytes(16 * MIB), "longest request body")
    requests_max: int = setting(2048, "requests in progress at once")


class WhenAway(enum.StrEnum):
    """What becomes of requests of tenants with limits while the metadata database is away."""

    LEASES = "leases"
    """They go on from what the DB node has leased, then are refused."""
    ALLOW = "allow"
    """They go on uncounted when that is used up."""


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """[tenants] limits of tenants at a DB node, and the log of changes to them."""

    parallel_waiting_max: int = setting(
        256, "requests of one tenant that wait for its limit of parallel requests, at one DB node"
    )
    audit_months_kept: int = setting(24, "whole months of the log of changes that are kept; 0: all of them")
    when_away: WhenAway = setting(
        WhenAway.LEASES,
        "requests of tenants with limits while the metadata database is away: leases (what was leased, then refused) or allow",
    )


@dataclass(frozen=True, slots=True)
class RouterSettings:
    """[router] how the DB node chooses workers."""

    workers: tuple[WorkerAddress, ...] = setting(
        (), "workers known from the start, besides those that register: http://host:port, vllm://host:port,key=value"
    )
    vllm_api_key: Secret | None = setting(None, "what vLLM servers were given as --api-key")
    policy: RouterPolicy = setting(
        RouterPolicy.COST,
        "how a worker is chosen: cost, prefix, least_load or round_robin; dynamo and aibrix are there to compare with",
    )
    split_tokens_min: int = setting(512, "uncached prompt tokens from which prefill and decode are split")
    refresh_s: float = setting(1.0, "how often worker states are read")
    index_blocks_max: int = setting(200_000, "blocks remembered per worker")
    worker_requests_max: int = setting(
        256,
        "requests a worker is given at once; one that tells how many sequences it decodes at once gets twice as many",
    )
    request_timeout_s: float = setting(600.0, "deadline of every request; infer() may ask for a shorter one")
    interactive_ttft_s: float = setting(
        0.0,
        "refuse interactive requests whose first token is expected later because of the load; 0: only at the deadline",
    )
    interactive_tpot_s: float = setting(
        0.0, "avoid workers that take longer per token for interactive requests; 0: do not"
    )
    batch_ttft_s: float = setting(0.0, "as interactive_ttft_s, of batch requests")
    batch_tpot_s: float = setting(0.0, "as interactive_tpot_s, of batch requests")
    poison_prompt_s: float = setting(600.0, "a prompt that two workers died of is refused for so long; 0: not at all")


@dataclass(frozen=True, slots=True)
class ConversationsSettings:
    """[conversations] histories that DB nodes keep for their tenants."""

    ttl_s: float = setting(30 * 86400.0, "a conversation that nobody adds to is deleted after so long")
    items_max: int = setting(2000, "messages of one conversation")
    bytes_max: Bytes = setting(Bytes(4 * MIB), "text of one conversation")
    per_tenant_max: int = setting(100_000, "conversations of one tenant")


@dataclass(frozen=True, slots=True)
class UsageSettings:
    """[usage] how long usage is kept."""

    months_kept: int = setting(24, "whole months of single requests that are kept; sums by day stay; 0: all of them")


class LogLevel(enum.StrEnum):
    """What is logged: this and what matters more."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class LogFormat(enum.StrEnum):
    """How a log line looks."""

    CONSOLE = "console"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class LogSettings:
    """[log] what is logged, and how."""

    level: LogLevel = setting(LogLevel.INFO, "debug, info, warning or error")
    format: LogFormat = setting(LogFormat.CONSOLE, "console or json")


@dataclass(frozen=True, slots=True)
class UpSettings:
    """[up] `stratakv up`: everything on one machine."""

    data_dir: Path = setting(
        Path("~/.local/share/stratakv"), "what outlives a restart: the embedded PostgreSQL, KV on disk"
    )
    daemons: int = setting(2, "memory-pool daemons")
    prefill_workers: int = setting(1, "workers for prefill")
    decode_workers: int = setting(1, "workers for decode")


IMPLIED = {
    ("meta", "kvcm_enabled"): ("kvcm_grpc_port", "kvcm_http_port", "admin_grpc_port", "admin_http_port"),
}
"""Settings that are true, unless something else is said, where one of these of their section is given."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All sections."""

    database: DatabaseSettings = DatabaseSettings()
    postgres: PostgresSettings = PostgresSettings()
    model: ModelSettings = ModelSettings()
    meta: MetaSettings = MetaSettings()
    pool: PoolSettings = PoolSettings()
    dmp: DmpSettings = DmpSettings()
    worker: WorkerSettings = WorkerSettings()
    sql: SqlSettings = SqlSettings()
    rest: RestSettings = RestSettings()
    tenants: TenantSettings = TenantSettings()
    router: RouterSettings = RouterSettings()
    conversations: ConversationsSettings = ConversationsSettings()
    usage: UsageSettings = UsageSettings()
    log: LogSettings = LogSettings()
    up: UpSettings = UpSettings()
