"""Catalog of metrics: the metric of each entry of ``Blocks.stats``, and its meaning."""

import re
from dataclasses import dataclass

from flexkv.config.tiers import LOWER_TIERS


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric.

    Attributes
    ----------
    name : str
        Name without the prefix ``flexkv_``. A counter is exported with ``_total`` appended.
    text : str
        Description of the quantity.
    is_counter : bool
        True: a count since the start. False: a current value.
    """

    name: str
    text: str
    is_counter: bool = False


Entry = tuple[Metric, dict[str, str]]
"""A metric, and the labels of one of its values."""

REQUESTS = Metric(
    "requests", "Requests matched, by outcome (full, partial, miss) and by the reason why no more blocks were found",
    True,
)
NAMESPACE_BLOCKS = Metric("namespace_blocks", "Blocks by tier and namespace, where namespaces have quotas")

_OF_TIERS = {
    "slots": Metric("slots", "Slots, each of which holds a block, by tier"),
    "free_slots": Metric("free_slots", "Slots that are free, by tier"),
    "evicted_blocks": Metric("evicted_blocks", "Blocks evicted to make room for others, by tier", True),
    "expired_blocks": Metric("expired_blocks", "Blocks not used for longer than their ttl_s, by tier", True),
    "altered_blocks": Metric("altered_blocks", "Blocks whose bytes differ from their known checksum, by tier", True),
    "limbo_slots": Metric("limbo_slots", "Slots of evicted blocks that a transfer may still read or write, by tier"),
    "stale_results": Metric("stale_results", "Results refused because their slots were freed earlier, by tier", True),
}
_SSD_FAULTS = (
    "read_errors", "write_errors", "table_errors", "timeouts", "checksum_mismatches", "key_mismatches", "refused",
)
SSD_FAULTS = Metric("ssd_faulty_blocks", "Blocks that could not be read or written, by fault", True)

_PLAIN = {
    "queried_blocks": Metric("queried_blocks", "Blocks that requests wanted", True),
    "hit_blocks": Metric("hit_blocks", "Blocks that requests wanted and that were found", True),
    "hit_blocks_on_ssd": Metric("hit_blocks_on_ssd", "Blocks found that had to be read from SSD", True),
    "indexed_blocks": Metric("indexed_blocks", "Blocks in the index, on any tier"),
    "index_bytes": Metric("index_bytes", "Memory of the index"),
    "pinned_blocks": Metric("pinned_blocks", "Pinned blocks"),
    "tasks": Metric("tasks", "Tasks that run, or whose result has not been taken"),
    "provisional_puts": Metric("provisional_puts", "Saves that wait until the engine accepts their step"),
    "in_service": Metric("in_service", "Whether KV can be moved: 0 once the data plane has failed repeatedly"),
    "blocks_being_fetched": Metric("blocks_being_fetched", "Blocks on their way from SSD to host memory"),
    "ssd_store_blocks_read": Metric("ssd_read_blocks", "Blocks read from SSD and verified", True),
    "ssd_store_blocks_written": Metric("ssd_stored_blocks", "Blocks written to SSD, also directly from a GPU", True),
    "ssd_store_slots_retired": Metric("ssd_retired_slots", "Slots retired after errors", True),
    "ssd_store_directories_gone_offline": Metric("ssd_outages", "Times a directory was taken offline", True),
    "ssd_store_directories": Metric("ssd_directories", "Directories of the SSD tier"),
    "ssd_store_directories_usable": Metric("ssd_directories_usable", "Directories of the SSD tier in service"),
    "ssd_store_queued_bytes": Metric("ssd_queued_bytes", "Bytes of reads and writes submitted and not completed"),
    "ssd_store_device_is_ready": Metric("gds_is_ready", "Whether blocks are moved directly between SSD and GPU"),
}

_TIERS = {"host": "", **{name: f"{name}_" for name in LOWER_TIERS}}
"""Prefix of the statistics of each tier."""


def _write_back(tier: str) -> dict[str, Metric]:
    """Metrics of the write-back to a lower tier."""
    name = tier.upper() if tier == "ssd" else f"tier {tier}"
    return {
        f"{tier}_written_blocks": Metric(f"{tier}_written_blocks", f"Blocks copied from host memory to {name}", True),
        f"{tier}_dropped_writes": Metric(
            f"{tier}_dropped_writes", f"Blocks not copied to {name} because the queue was full", True
        ),
        f"{tier}_queued_blocks": Metric(f"{tier}_queued_blocks", f"Blocks that wait to be copied to {name}"),
        f"{tier}_blocks_being_written": Metric(f"{tier}_blocks_being_written", f"Blocks on their way to {name}"),
    }


_ENTRIES: dict[str, Entry] = {
    **{name: (metric, {}) for name, metric in _PLAIN.items()},
    **{
        f"{prefix}{name}": (metric, {"tier": tier})
        for name, metric in _OF_TIERS.items()
        for tier, prefix in {**_TIERS, "host": "num_" if name == "slots" else ""}.items()
    },
    **{name: (metric, {}) for tier in LOWER_TIERS for name, metric in _write_back(tier).items()},
    **{f"ssd_store_{name}": (SSD_FAULTS, {"fault": name}) for name in _SSD_FAULTS},
    "full_hits": (REQUESTS, {"outcome": "full", "reason": "full_hit"}),
}
NOT_EXPORTED = frozenset({"ssd_store_num_slots"})
"""Entries that are not exported, because other metrics have the same values."""


def entry_of(stat: str) -> Entry | None:
    """The metric and labels of an entry of ``Blocks.stats``; None: the entry is not exported."""
    if found := _ENTRIES.get(stat):
        return found
    if match := re.fullmatch(r"(miss|partial)_(\w+)", stat):
        return REQUESTS, {"outcome": match[1], "reason": match[2]}
    for tier, prefix in _TIERS.items():
        if match := re.fullmatch(rf"{prefix}namespace_(.*)_blocks", stat, re.DOTALL):
            return NAMESPACE_BLOCKS, {"tier": tier, "namespace": match[1]}
        if prefix and stat not in NOT_EXPORTED and (match := re.fullmatch(rf"{prefix}(store_\w+)", stat)):
            return Metric(stat, f"Count of the store of tier {tier}: {match[1]}"), {}
    return None
