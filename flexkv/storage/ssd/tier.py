"""The SSD tier: its settings and its store."""

from flexkv._core.io.io_queue import IoQueue
from flexkv.config import CacheConfig
from flexkv.storage.ssd.store import SsdStore
from flexkv.storage.store import Store, TierKind


def _make_store(config: CacheConfig, slot_bytes: int, domain: bytes, memory: object) -> Store:
    """Open the store in the directories of the configuration."""
    return SsdStore(
        config.ssd_directories, config.ssd_bytes, slot_bytes, domain, memory, make_queue=IoQueue,
        deadline_s=config.ssd_deadline_s, depth=config.ssd_queue_depth, method=config.ssd_io,
    )


SSD = TierKind(
    name="ssd",
    label="SSD",
    num_bytes=lambda config: config.ssd_bytes,
    make_store=_make_store,
    writes_all=lambda config: config.ssd_admission == "all",
    write_bytes_per_s=lambda config: config.ssd_write_mb_per_s * (1 << 20),
    read_deadline_s=lambda config: 2 * config.ssd_deadline_s,      # longer than the wait for one hanging access
    closed_stats=lambda config: {"directories": len(config.ssd_directories), "directories_usable": 0},
)
