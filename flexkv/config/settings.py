"""The settings of the model, the cache, transfers and the engine adapter."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from flexkv.config.field import read_field, setting
from flexkv.config.guarantees import check_guarantees, read_guarantees
from flexkv.config.memory import memory_limit
from flexkv.config.namespaces import Quota, read_quotas
from flexkv.config.numa import read_numa_nodes
from flexkv.config.paths import SEPARATOR, expand, expand_directories, register_port
from flexkv.config.values import ports
from flexkv.errors import ConfigError

DTYPE_BYTES = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}
"""Bytes of an element, by torch's name of the type."""


@dataclass(frozen=True, kw_only=True)
class _Settings:
    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, read_field(type(self), field, getattr(self, field.name)))
        for problem in self.conflicts():
            raise problem

    def conflicts(self) -> Iterator[ConfigError]:
        """Conflicts between settings, each of which is valid by itself."""
        return iter(())

    @classmethod
    def conflicts_of(cls, values: Mapping[str, Any]) -> list[ConfigError]:
        """All conflicts that settings with these values would have. Each value must be valid by itself."""
        settings = object.__new__(cls)
        for field in dataclasses.fields(cls):
            object.__setattr__(settings, field.name, values.get(field.name, field.default))
        return list(settings.conflicts())

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked again."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(_Settings):
    """Identity of a model's KV, and its layout over ranks. Given by the engine's adapter."""

    num_layers: int = setting(1, "Layers that have KV, over all pipeline stages.", low=1)
    num_kv_heads: int = setting(1, "KV heads of the whole model.", low=1)
    head_size: int = setting(1, "Elements of a head; with MLA, of the latent vector.", low=1)
    dtype: str = setting("bfloat16", "Element type of the KV cache, by torch's name; of packed types, by the engine's.")
    use_mla: bool = setting(False, "One latent vector a token instead of K and V.")
    tp_size: int = setting(1, "Tensor-parallel ranks.", low=1)
    pp_size: int = setting(1, "Pipeline-parallel ranks.", low=1)
    dp_size: int = setting(1, "Data-parallel ranks.", low=1)
    nnodes: int = setting(1, "Nodes over which the ranks of one engine are divided, in equal parts.", low=1, high=1024)
    model_id: str = setting("", "Name or path of the model. Different models never share KV.")
    revision: str = setting("", "Version of its weights. Different versions never share KV.")
    weights_id: str = setting("", "Identity of its weights, as by `weights_id(path)`. Different ones never share KV.")
    config_digest: str = setting("", "Digest of all else that changes the KV of given tokens, such as RoPE parameters.")
    engine: str = setting("", "Engine, version and backend, which determine the layout of KV in memory.")

    @property
    def kv_dim(self) -> int:
        """Number of vectors of each token, head and layer: 2 (K and V), or 1 with MLA."""
        return 1 if self.use_mla else 2

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV of one token, over all ranks; ConfigError for a packed dtype, whose elements have no size."""
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise ConfigError("dtype", self.dtype, f"has no fixed element size; sizes are known for {known}")
        heads = 1 if self.use_mla else self.num_kv_heads
        return self.num_layers * self.kv_dim * heads * self.head_size * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class CacheConfig(_Settings):
    """Tiers, eviction, quotas, metrics."""

    tokens_per_block: int = setting(16, "Tokens of a block, the unit of caching; the engine's page size.", low=1)
    cpu_cache_gb: float = setting(16.0, "Memory of the host tier.", unit="GiB", low=0.0)
    num_cpu_blocks: int | None = setting(None, "Blocks of the host tier; instead of `cpu_cache_gb`.", low=1)
    eviction_policy: str = setting(
        "adaptive", "Order in which blocks are evicted when a tier is full.",
        choices=("adaptive", "lru", "lfu", "slru", "fifo", "mru", "filo", "s3fifo", "arc"),
    )
    evict_start_threshold: float = setting(
        0.98, "Share of a tier (host or SSD) in use above which blocks are evicted ahead of need.", low=0.0, high=1.0
    )
    evict_ratio: float = setting(
        0.01, "Share of a tier that one batch of evictions frees; 4,096 blocks at most.", low=0.0, high=1.0
    )
    hit_reward_seconds: float = setting(
        0.0, "Time by which each hit makes a block count as younger for eviction. No effect with `adaptive`.",
        unit="s", low=0.0,
    )
    use_hugepage_cpu_buffer: bool = setting(
        False, "Host tier in hugepages of `hugepage_size_bytes`, reserved with `vm.nr_hugepages`. If too few are "
        "reserved, hugepages of 2 MiB are tried, then ordinary pages; the log has a warning.",
    )
    hugepage_size_bytes: int = setting(
        2 << 20, "Size of the hugepages of `use_hugepage_cpu_buffer`.", unit="bytes", low=4096
    )
    numa_nodes: str = setting(
        "", "NUMA nodes that hold the host tier in turn, 64 MiB each, such as `0,1`. Empty: the kernel's choice."
    )
    ssd_cache_gb: float = setting(
        0.0, "Size of the SSD tier; 0: none. Must exceed the host tier, because blocks that are used again are on "
        "both.",
        unit="GiB", low=0.0,
    )
    ssd_cache_dir: str = setting(
        "./flexkv_ssd", "Directories of the SSD tier, separated by `;` (or a list), ideally one for each device. "
        "Requires `ssd_cache_gb`.",
        read=expand_directories,
    )
    ssd_admission: str = setting(
        "second_touch",
        "Blocks that are written to SSD once it has no free slots. `second_touch`: blocks with evidence of reuse; "
        "`all`: all blocks. See [SSD](ssd.md#which-blocks-are-written-and-when).",
        choices=("second_touch", "all"),
    )
    ssd_write_mb_per_s: float = setting(
        0.0, "Maximum rate of writes to SSD, to limit wear; 0: no limit.", unit="MiB/s", low=0.0
    )
    ssd_queue_depth: int = setting(64, "Maximum number of reads and writes in flight on SSD.", low=1, high=4096)
    ssd_io: str = setting(
        "auto", "Method of SSD reads and writes. `uring`: io_uring; `threads`: threads; `auto`: the first of these "
        "that works.",
        choices=("auto", "uring", "threads"),
    )
    enable_gds: bool = setting(
        False, "GPUDirect Storage: blocks that are on SSD alone are read directly into the GPU, not through host "
        "memory. See [SSD](ssd.md#gpudirect-storage).",
    )
    ssd_deadline_s: float = setting(
        10.0, "Time limit of a read or write on SSD. One that takes longer fails.", unit="s", low=0.01
    )
    server_max_pools: int = setting(
        1, "Pools of `flexkv serve`, one for each layout of a block. Models with equal layouts share a pool. The pools "
        "divide host memory by use; each has an equal part of the SSD. If all are taken, a new layout replaces the "
        "pool that has been without an engine for the longest, and its SSD blocks.",
        low=1, high=64,
    )
    server_guarantees: Mapping[str, Any] | None = setting(
        None, "Host memory in GiB that each of these models keeps in any case, in a pool of its own: `{model: GiB}`, "
        "with the model's name as the engine has it. As a variable: JSON or YAML. Needs `server_max_pools`. See "
        "[daemon](daemon.md#several-models).",
    )
    load_policy: str = setting(
        "auto", "Blocks that are loaded from SSD. `auto`: blocks that load faster than they are computed; `always`: "
        "all blocks; `never`: none.",
        choices=("auto", "always", "never"),
    )
    prefill_tokens_per_s: float = setting(
        0.0, "Speed of the engine's prefill, for `load_policy`. 0: measured, with vLLM; with other engines the speed "
        "is unknown then, and `auto` loads all blocks.",
        unit="tokens/s", low=0.0,
    )
    namespaces: Mapping[str, Any] | None = setting(
        None, "Quota of each namespace (`lora:NAME`, `salt:SALT`, or a tenant): `{name: {guaranteed, limit, "
        "priority, ttl_s}}`, shares from 0 to 1 of each tier; `default`: all others together. As a variable: JSON or "
        "YAML. See [namespaces](namespaces.md).",
    )
    max_pinned_share: float = setting(
        0.5, "Maximum share of the host tier that can be pinned (`flexkv pin`).", low=0.0, high=0.9
    )
    trace_path: str = setting(
        "", "File in which the block keys of all requests are recorded, without their tokens, for `flexkv replay`; "
        "empty: none.",
        read=expand,
    )
    trace_max_mb: int = setting(
        256, "Maximum size of the file at `trace_path`; recording ends there.", unit="MiB", low=1
    )
    enable_metrics: bool = setting(False, "Serve metrics to Prometheus. See [monitoring](monitoring.md).")
    metrics_host: str = setting(
        "127.0.0.1", "Address for metrics; 0.0.0.0: all addresses of this machine, if Prometheus runs on another one."
    )
    py_metrics_port: int = setting(
        8080, "Port for metrics; each data-parallel rank adds its number. 0: any free port, which is logged.",
        low=0, high=65000,
    )
    key_secret: str = setting(
        "", "Secret of the deployment, which enters every block key: at least 32 random characters. Empty: keys resist "
        "chosen prompts up to 2^64 hashes; see [namespaces](namespaces.md#keys).", secret=True,
    )

    def conflicts(self) -> Iterator[ConfigError]:
        """Conflicts between settings, each of which is valid by itself."""
        size = self.hugepage_size_bytes
        if size & (size - 1):
            yield ConfigError("hugepage_size_bytes", size, "must be a power of two, such as 2097152")
        if self.num_cpu_blocks is None:
            yield from self._host_conflicts()
        if self.ssd_cache_gb and not self.ssd_directories:
            yield ConfigError("ssd_cache_dir", self.ssd_cache_dir, "must name at least one directory")
        if self.enable_gds and not self.ssd_cache_gb:
            yield ConfigError("enable_gds", True, "needs an SSD tier: set ssd_cache_gb, or turn it off")
        try:
            read_quotas(self.namespaces or {})                # a wrong quota stops the start
            read_numa_nodes(self.numa_nodes)
            check_guarantees(
                self.guarantees, self.host_bytes, self.num_cpu_blocks, self.server_max_pools, bool(self.hugepage_bytes)
            )
        except ConfigError as error:
            yield error

    def _host_conflicts(self) -> Iterator[ConfigError]:
        limit = memory_limit()
        if self.cpu_cache_gb <= 0:
            yield ConfigError("cpu_cache_gb", self.cpu_cache_gb, "must be more than 0 (GiB)")
        elif limit is not None and self.host_bytes > limit:
            yield ConfigError(
                "cpu_cache_gb", self.cpu_cache_gb,
                f"must leave room in the {limit / (1 << 30):.1f} GiB that this machine or its control group allows: "
                f"at most {math.floor(limit / (1 << 30) * 100) / 100:g} (GiB), minus the memory of the engine itself",
            )
        if self.ssd_cache_gb and self.ssd_cache_gb <= self.cpu_cache_gb:
            yield ConfigError(
                "ssd_cache_gb", self.ssd_cache_gb, f"must be more than cpu_cache_gb ({self.cpu_cache_gb:g}), or 0"
            )

    @property
    def host_bytes(self) -> int:
        """Bytes of the host tier."""
        return int(self.cpu_cache_gb * (1 << 30))

    @property
    def ssd_bytes(self) -> int:
        """Bytes of the SSD tier; 0: there is no SSD tier."""
        return int(self.ssd_cache_gb * (1 << 30))

    @property
    def quotas(self) -> dict[str, Quota]:
        """Quotas by namespace; ``""``: quota of all others."""
        return read_quotas(self.namespaces or {})

    @property
    def guarantees(self) -> dict[str, int]:
        """Bytes of host memory that models of the daemon keep, by model."""
        return read_guarantees(self.server_guarantees or {})

    @property
    def ssd_directories(self) -> list[Path]:
        """Directories of the SSD tier."""
        return [Path(part.strip()) for part in self.ssd_cache_dir.split(SEPARATOR) if part.strip()]

    @property
    def hugepage_bytes(self) -> int:
        """Size of the pages of the host tier; 0: ordinary ones."""
        return self.hugepage_size_bytes if self.use_hugepage_cpu_buffer else 0

    @property
    def secret(self) -> bytes:
        """``key_secret`` as bytes."""
        return self.key_secret.encode()


@dataclass(frozen=True, kw_only=True)
class TransferConfig(_Settings):
    """Connection of controller and ranks, time limits, copies."""

    gpu_register_port: str = setting(
        "", "Unix socket at which ranks register, as a path or `ipc://PATH`; empty: chosen by the adapter.",
        read=register_port,
    )
    server_client_mode: bool = setting(
        False, "KV is kept by the daemon of the node (`flexkv serve`), which several engines share, and not in the "
        "engine's process. See [Daemon](daemon.md).",
    )
    server_recv_port: str = setting(
        "", "Unix socket of the daemon, as a path or `ipc://PATH`; empty: `server.sock` in the runtime directory. "
        "Setting it turns `server_client_mode` on.",
        read=register_port,
    )
    server_launch_mode: str = setting(
        "embedded", "Start of the daemon. `embedded`: the first engine that finds none starts one, which ends when no "
        "engine has used it for a minute; `external`: an operator starts it.",
        choices=("embedded", "external"),
    )
    instance_num: int = setting(
        1, "Engines of the node that share the daemon. More than 1 turns `server_client_mode` on.", low=1, high=1024
    )
    instance_id: int = setting(0, "Number of this engine among them, from 0.", low=0, high=1023)
    kv_shared_across_ranks_mode: str = setting(
        "sharded", "Saves of KV that is equal on several ranks (MLA; more ranks than KV heads), which is stored once. "
        "`sharded`, `layer_parallel`, `all_write`: each rank writes a part; `rank0_only`: the first rank writes all; "
        "`rank_rotate`: one rank writes all, another one in each engine.",
        choices=("sharded", "rank0_only", "rank_rotate", "layer_parallel", "all_write"),
    )
    exchange_copies: bool = setting(
        True, "Large loads of such KV: each rank reads a part from host memory, and the other parts from the GPUs of "
        "the other ranks. Needs all ranks on one node and NVLink between their GPUs. Off: each rank reads all of it "
        "from host memory.",
    )
    master_host: str = setting(
        "localhost", "An engine on several nodes: address at which its first node listens, and to which the others "
        "connect; with vLLM the default is its `--master-addr`. See [Nodes](nodes.md).",
    )
    master_ports: str = setting(
        "5556", "TCP port of the first node; with vLLM, data-parallel rank `i` uses the port plus `i`. Of a list with "
        "commas, as upstream has it, the first port is used.",
        read=ports,
    )
    node_secret: str = setting(
        "", "Secret that the nodes of an engine share, at least 32 random characters; required with several nodes. "
        "Messages are authenticated with it, not encrypted.", secret=True,
    )
    handshake_timeout_s: float = setting(
        5.0, "Time after which a connection is dropped if no message arrives on it.", unit="s", low=0.01
    )
    op_timeout_s: float = setting(
        20.0, "Time limit of a transfer, counted from the engine's step that it waits for. A transfer fails in any "
        "case after ten times as long.", unit="s", low=0.01,
    )
    connect_timeout_s: float = setting(300.0, "Time for which a rank waits for the controller.", unit="s", low=0.1)
    gpu_strategy: str = setting(
        "auto", "Method of copies between GPU and host memory. `staged`: a kernel gathers blocks into a staging buffer "
        "that the copy engine moves; `direct`: the kernel moves the blocks itself; `batch`: the copy engine moves each "
        "chunk; `auto`: by size.",
        choices=("auto", "staged", "direct", "batch"),
    )
    gpu_window_mb: int = setting(
        8, "Size of each of six staging buffers in GPU memory. If all fit the GPU's L2, they disturb compute least.",
        unit="MiB", low=1, high=1024
    )
    gpu_num_ctas: int = setting(16, "Thread blocks of the copy kernel.", low=1, high=1024)
    enable_layerwise_transfer: bool = setting(
        False, "SGLang: signal an eventfd of the rank for each layer of a load as soon as the layer has arrived."
    )
    ring_bytes: int = setting(1 << 20, "Size of each shared-memory ring; a power of two.", unit="bytes", low=4096)

    def conflicts(self) -> Iterator[ConfigError]:
        """Conflicts between settings, each of which is valid by itself."""
        if self.ring_bytes & (self.ring_bytes - 1):
            yield ConfigError("ring_bytes", self.ring_bytes, "must be a power of two, such as 1048576")

    @property
    def master_port(self) -> int:
        """TCP port of the first node."""
        return int(self.master_ports.partition(",")[0])

    @property
    def uses_daemon(self) -> bool:
        """Whether the daemon of the node keeps the engine's KV."""
        return self.server_client_mode or bool(self.server_recv_port) or self.instance_num > 1


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig(_Settings):
    """Behaviour of the engine adapters."""

    save_mode: str = setting(
        "as_computed",
        "Time at which KV is saved. `as_computed`: as blocks fill during prefill and decode; `at_finish`: when a "
        "request finishes (as upstream does).",
        choices=("as_computed", "at_finish"),
    )
    layerwise_loads: str = setting(
        "auto",
        "Load layer by layer, so that compute of the first layers overlaps the load. `auto`: only when no other "
        "request runs, because others would have to wait. Never with full CUDA graphs, which skip vLLM's hooks.",
        choices=("auto", "always", "never"),
    )
    audit: bool = setting(
        False, "Compare the bytes of every loaded block with the bytes that were saved; for tests, slow."
    )
    audit_path: str = setting(
        "", "With `audit`: path of the files in which its checksums are kept between starts, one for each rank; empty: "
        "they are not kept.",
        read=expand,
    )
    num_log_interval_requests: int = setting(200, "Number of requests between two log lines on hits; 0: none.", low=0)
    log_level: str = setting("INFO", "Level of the package's log.", choices=("DEBUG", "INFO", "WARNING", "ERROR"))


@dataclass(frozen=True, kw_only=True)
class FlexKVConfig:
    """All settings that a user gives.

    Attributes
    ----------
    given : mapping of str to str
        For each setting that was given: the place where it was given.
    """

    cache: CacheConfig = dataclasses.field(default_factory=CacheConfig)
    transfer: TransferConfig = dataclasses.field(default_factory=TransferConfig)
    connector: ConnectorConfig = dataclasses.field(default_factory=ConnectorConfig)
    given: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)
