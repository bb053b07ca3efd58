"""What operators and clients register: storages, instance groups, instances; and the checks on them."""

from __future__ import annotations

import enum
import importlib.util
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import msgspec

from meta_server.kvcm.errors import NotSupported
from meta_server.kvcm.protocol import admin_service_pb2 as admin
from meta_server.kvcm.protocol import meta_service_pb2 as meta
from meta_server.kvcm.ranking import Ranking
from meta_server.kvcm.writes import Layout, Location, Place
from meta_server.validate import NAME_CHARS_MAX, PAGE_BYTES_MAX, SIZE_BYTES_MAX
from stratakv.errors import InvalidRequest

SPECS_MAX = 1024
"""Of one instance."""
GROUPS_OF_SPECS_MAX = 255
KEYS_PER_FILE_MAX = 65_536
INSTANCES_MAX = 100_000
STORAGES_MAX = 1000
GROUPS_MAX = 1000
_MOONCAKE_OPTIONS = ("local_hostname", "metadata_connstring", "protocol", "rdma_device")
DEFAULT_STORAGE = "nfs_01"
DEFAULT_GROUP = "default"


class HealthState(enum.IntEnum):
    """Of a storage; the numbers are those of OperatorService."""

    NOT_PROBED = 0
    HEALTHY = 1
    FULL = 2
    FAILING = 3


@dataclass(frozen=True, slots=True)
class Health:
    """How a storage was when it was last looked at."""

    state: HealthState = HealthState.NOT_PROBED
    detail: str = ""
    used_share: float | None = None
    """None: not known."""

    @property
    def takes_blocks(self) -> bool:
        return self.state in (HealthState.NOT_PROBED, HealthState.HEALTHY)


@dataclass(slots=True)
class Storage:
    """A place for what clients write themselves."""

    config: admin.StorageConfig
    enabled: bool = True
    health: Health = Health()

    @property
    def name(self) -> str:
        return str(self.config.global_unique_name)

    @property
    def place(self) -> Place:
        if self.config.WhichOneof("storage_spec") == "nfs":
            spec = self.config.nfs
            return Place(self.name, admin.ST_NFS, "file", spec.root_path.rstrip("/"), max(1, spec.key_count_per_file))
        if self.config.WhichOneof("storage_spec") == "mooncake":
            store = self.config.mooncake
            options = ((name, getattr(store, name)) for name in _MOONCAKE_OPTIONS)
            return Place(self.name, admin.ST_MOONCAKE, "mooncake", store.master_service_entry, 1, tuple(options))
        fs = self.config.threefs
        root = str(PurePosixPath(fs.mountpoint) / fs.root_dir.strip("/"))
        return Place(self.name, admin.ST_3FS, "3fs", root, max(1, fs.key_count_per_file))

    def described(self) -> dict[str, object]:
        """As RegisterInstance tells a client of it."""
        place = self.place
        if place.type == admin.ST_NFS:
            kind, spec = "file", {"root_path": self.config.nfs.root_path}
        elif place.type == admin.ST_MOONCAKE:
            kind, spec = "mooncake", {**dict(place.options), "master_service_entry": place.root}
        else:
            fs = self.config.threefs
            kind, spec = (
                "hf3fs",
                {"cluster_name": fs.cluster_name, "mountpoint": fs.mountpoint, "root_dir": fs.root_dir},
            )
        return {
            "type": kind,
            "is_available": self.enabled,
            "global_unique_name": self.name,
            "storage_spec": {**spec, "key_count_per_file": place.keys_per_file},
        }


@dataclass(slots=True)
class Group:
    """Quota and policy of some instances, what they use of it, and which of their blocks is coldest."""

    config: admin.InstanceGroup
    ranking: Ranking = field(init=False)
    """Blocks served."""
    used_bytes: dict[int, int] = field(default_factory=dict)
    """By storage type, of blocks being written or served."""
    num_keys: int = 0
    """Being written or served."""

    def __post_init__(self) -> None:
        self.ranking = Ranking(time.monotonic, self.policy)

    @property
    def name(self) -> str:
        return str(self.config.name)

    @property
    def used_percentage(self) -> float:
        return float(self.config.cache_config.reclaim_strategy.trigger_strategy.used_percentage) or 1.0

    @property
    def policy(self) -> int:
        return int(self.config.cache_config.reclaim_strategy.reclaim_policy)

    @property
    def ttl_s(self) -> int:
        """Of policy ttl."""
        return int(self.config.cache_config.reclaim_strategy.trigger_period_seconds)

    @property
    def reclaim_step_size(self) -> int:
        """0: not given."""
        return int(self.config.cache_config.reclaim_strategy.reclaim_step_size)

    def level(self, capacity: int) -> float:
        """Bytes above which blocks are reclaimed."""
        used_size = int(self.config.cache_config.reclaim_strategy.trigger_strategy.used_size)
        level = capacity * self.used_percentage
        return min(level, used_size) if used_size else level

    @property
    def max_key_count(self) -> int:
        """0: no limit."""
        return int(self.config.cache_config.meta_indexer_config.max_key_count)

    def byte_limits(self) -> list[tuple[int | None, int]]:
        """(type or None for all of them, bytes) of every limit."""
        quota = self.config.quota
        limits: list[tuple[int | None, int]] = [(q.storage_type, q.capacity) for q in quota.quota_config if q.capacity]
        return [*limits, (None, quota.capacity)] if quota.capacity else limits

    def count(self, storage_type: int, num_keys: int, size_bytes: int) -> None:
        """So many more; negative ones are fewer."""
        self.used_bytes[storage_type] = self.used_bytes.get(storage_type, 0) + size_bytes
        self.num_keys += num_keys

    def used(self, storage_type: int | None) -> int:
        return sum(self.used_bytes.values()) if storage_type is None else self.used_bytes.get(storage_type, 0)


@dataclass(slots=True)
class Instance:
    """One deployment of a model; its blocks are its own."""

    config: meta.RegisterInstanceRequest
    by_key: dict[int, list[Location]] = field(default_factory=dict)
    """Locations being written or served."""

    @property
    def id(self) -> str:
        return str(self.config.instance_id)

    @property
    def group(self) -> str:
        return str(self.config.instance_group)

    @property
    def block_size(self) -> int:
        return int(self.config.block_size)

    def layout(self, group: str = "") -> Layout:
        """The specs of a block of a spec group, or all of them. Raises InvalidRequest."""
        sizes = {spec.name: spec.size for spec in self.config.location_spec_infos}
        if not group:
            return tuple(sizes.items())
        for known in self.config.location_spec_groups:
            if known.name == group:
                return tuple((name, sizes[name]) for name in known.spec_names)
        raise InvalidRequest(f"instance {self.id} has no spec group {group!r}", param="location_spec_group_names")

    def check_spec_names(self, names: frozenset[str]) -> None:
        """Raises InvalidRequest."""
        if unknown := names - {spec.name for spec in self.config.location_spec_infos}:
            raise InvalidRequest(f"instance {self.id} has no spec {min(unknown)!r}", param="location_spec_names")

    def info(self) -> meta.InstanceInfo:
        config, group = self.config, self.group
        return meta.InstanceInfo(
            quota_group_name=group,
            instance_group_name=group,
            instance_id=config.instance_id,
            block_size=config.block_size,
            location_spec_infos=config.location_spec_infos,
            model_deployment=config.model_deployment,
            location_spec_groups=config.location_spec_groups,
            default_query_type=config.default_query_type,
        )


def check_name(field_name: str, value: str) -> None:
    """Raises InvalidRequest."""
    if not 0 < len(value) <= NAME_CHARS_MAX or "\0" in value:
        raise InvalidRequest(f"{field_name} must have 1 to {NAME_CHARS_MAX} characters", param=field_name)


def check_instance(config: meta.RegisterInstanceRequest) -> None:
    """Raises InvalidRequest."""
    check_name("instance_id", config.instance_id)
    check_name("instance_group", config.instance_group)
    if config.block_size < 1:
        raise InvalidRequest("block_size must be at least 1", param="block_size")
    names = [spec.name for spec in config.location_spec_infos]
    if not 0 < len(names) <= SPECS_MAX or len(set(names)) < len(names):
        raise InvalidRequest(f"expected 1 to {SPECS_MAX} specs, each once", param="location_spec_infos")
    for spec in config.location_spec_infos:
        check_name("location_spec_infos.name", spec.name)
        if not 0 < spec.size <= PAGE_BYTES_MAX:
            raise InvalidRequest(f"spec {spec.name}: size must be positive", param="location_spec_infos.size")
    groups = [group.name for group in config.location_spec_groups]
    if len(groups) > GROUPS_OF_SPECS_MAX or len(set(groups)) < len(groups):
        raise InvalidRequest("a spec group is named twice, or there are too many", param="location_spec_groups")
    for group in config.location_spec_groups:
        check_name("location_spec_groups.name", group.name)
        if not group.spec_names or len(set(group.spec_names)) < len(group.spec_names):
            raise InvalidRequest(f"spec group {group.name}: no specs, or one twice", param="location_spec_groups")
        if unknown := set(group.spec_names) - set(names):
            raise InvalidRequest(f"spec group {group.name}: no spec {min(unknown)!r}", param="location_spec_groups")


def check_storage(config: admin.StorageConfig) -> None:
    """Raises InvalidRequest, NotSupported."""
    check_name("global_unique_name", config.global_unique_name)
    kind = config.WhichOneof("storage_spec")
    if kind is None:
        raise InvalidRequest("the storage has no spec", param="storage")
    if kind not in ("nfs", "threefs", "mooncake"):
        raise NotSupported(f"storages of kind {kind} are not supported; nfs, threefs and mooncake are")
    if kind == "mooncake":
        _check_mooncake(config.mooncake)
        return
    spec = config.nfs if kind == "nfs" else config.threefs
    root = config.nfs.root_path if kind == "nfs" else config.threefs.mountpoint
    path = PurePosixPath(root)
    parts = {*path.parts, *PurePosixPath(config.threefs.root_dir).parts}
    if not path.is_absolute() or len(path.parts) < 2 or ".." in parts or "\0" in root + config.threefs.root_dir:
        raise InvalidRequest("a storage's root must be an absolute path, not / and without ..", param="storage")
    if not 0 <= spec.key_count_per_file <= KEYS_PER_FILE_MAX:
        raise InvalidRequest(f"key_count_per_file must be at most {KEYS_PER_FILE_MAX}", param="key_count_per_file")


def _check_mooncake(spec: admin.MooncakeStorageSpec) -> None:
    if not spec.master_service_entry:
        raise InvalidRequest("a Mooncake storage needs its master's address", param="master_service_entry")
    if importlib.util.find_spec("mooncake") is None:
        raise NotSupported("Mooncake's client is not installed on this meta server (`stratakv[mooncake]`)")


def check_group(config: admin.InstanceGroup) -> None:
    """Raises InvalidRequest, NotSupported."""
    check_name("name", config.name)
    strategy = config.cache_config.reclaim_strategy
    if strategy.reclaim_policy not in admin.ReclaimPolicy.values():
        raise NotSupported(f"reclaim_policy {strategy.reclaim_policy} is not supported")
    if strategy.reclaim_policy == admin.POLICY_TTL and strategy.trigger_period_seconds < 1:
        raise InvalidRequest("POLICY_TTL needs trigger_period_seconds", param="trigger_period_seconds")
    if not 0 <= strategy.trigger_strategy.used_percentage <= 1:
        raise InvalidRequest("used_percentage must be between 0 and 1", param="used_percentage")
    quota = config.quota
    numbers = [quota.capacity, *(q.capacity for q in quota.quota_config), config.max_instance_count]
    numbers += [config.cache_config.meta_indexer_config.max_key_count, strategy.delay_before_delete_ms]
    numbers += [strategy.trigger_strategy.used_size, strategy.reclaim_step_size, strategy.trigger_period_seconds]
    if not all(0 <= number <= SIZE_BYTES_MAX for number in numbers):
        raise InvalidRequest("a limit of the group is negative or too large", param="instance_group")


def check_candidates(config: admin.InstanceGroup, storages: Collection[str]) -> None:
    """Raises InvalidRequest unless all of the group's are there."""
    for name in config.storage_candidates:
        check_name("storage_candidates", name)
        if name not in storages:
            raise InvalidRequest(f"there is no storage {name!r}", param="storage_candidates")


def default_storage(root: str) -> Storage:
    spec = admin.NfsStorageSpec(root_path=root, key_count_per_file=1)
    return Storage(admin.StorageConfig(global_unique_name=DEFAULT_STORAGE, nfs=spec))


def default_group() -> Group:
    """What instances belong to that name no other."""
    reclaim = admin.CacheReclaimStrategy(
        reclaim_policy=admin.POLICY_LRU,
        trigger_strategy=admin.TriggerStrategy(used_percentage=0.8),
        delay_before_delete_ms=1000,
    )
    indexer = admin.MetaIndexerConfig(max_key_count=1_000_000)
    return Group(
        admin.InstanceGroup(
            name=DEFAULT_GROUP,
            storage_candidates=[DEFAULT_STORAGE],
            max_instance_count=100,
            quota=admin.InstanceGroupQuota(capacity=30_000_000_000),
            cache_config=admin.CacheConfig(reclaim_strategy=reclaim, meta_indexer_config=indexer),
            version=1,
        )
    )


def storage_configs(storages: list[Storage]) -> str:
    """`RegisterInstanceResponse.storage_configs`."""
    return msgspec.json.encode([storage.described() for storage in storages]).decode()
