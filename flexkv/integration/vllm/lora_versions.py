"""Versions of the LoRAs of requests. A version identifies the content of an adapter's files that the engine loaded."""

import logging
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv.config.weights import adapter_files, adapter_identity
from flexkv.errors import IdentityError
from flexkv.integration.vllm.identity import snapshot

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

logger = logging.getLogger("flexkv.vllm")

_SLACK_NS = 1_000_000_000
"""Tolerance for the clock of file systems."""

_Signature = tuple[tuple[str, int, int, int, int], ...]
"""Name, size, inode, time of last write and time of last change of each file."""


@dataclass(slots=True)
class _Loaded:
    signature: _Signature
    version: str


class LoraVersions:
    """Determines the version of each LoRA.

    vLLM reads an adapter when a request needs it and it is not loaded, and at each use if the request has
    ``load_inplace``. The scheduler is not notified of a read. So there are four cases:

    1. The files have not changed since before this object was created. They are equal to the loaded content, at
       whatever time it was loaded. Their digest is the version.
    2. The files changed between this object's creation and the first request with the LoRA. They are assumed to be
       equal to the loaded content. The version is valid in this process only.
    3. The files changed after the first request. The loaded content is unknown, and the LoRA has no version until a
       request loads it in place.
    4. The adapter has no local files (tensors, or a name of the hub that is resolved at load). The version is valid in
       this process only, for its ``lora_int_id``; if the adapter is loaded in place, it has no version.
    """

    def __init__(self) -> None:
        self._made_ns = time.time_ns() - _SLACK_NS
        self._process = secrets.token_hex(16)
        self._loaded: dict[int, _Loaded] = {}
        self._warned: set[int] = set()

    def version(self, lora: "LoRARequest") -> str | None:
        """Version of the loaded content; None: the content is unknown, so the LoRA's KV is neither used nor saved."""
        number = int(getattr(lora, "lora_int_id", 0))
        in_place = bool(getattr(lora, "load_inplace", False))
        try:
            path = _local_path(str(lora.lora_path))
            signature = _signature(path)
        except (IdentityError, OSError, ValueError):
            return None if in_place else f"{self._process} {number}"
        known = self._loaded.get(number)
        if known is None or (in_place and known.signature != signature):
            known = self._load(number, path, signature, in_place)
        if known is None:
            return None
        if known.signature == signature:
            return known.version
        if number not in self._warned:
            self._warned.add(number)
            logger.warning(
                "files of LoRA %s were changed after it was loaded: its KV is neither used nor saved until it is "
                "loaded in place (load_inplace) or under another name", lora.lora_name,
            )
        return None

    def _load(self, number: int, path: Path, signature: _Signature, in_place: bool) -> _Loaded | None:
        try:
            identity = adapter_identity(path)
        except IdentityError:
            return None
        version = identity.digest
        if identity.changed_ns > self._made_ns:
            version += f" {self._process} {'in place' if in_place else 'as first seen'}"
        self._warned.discard(number)
        loaded = self._loaded[number] = _Loaded(signature, version)
        return loaded


def _local_path(path: str) -> Path:
    """Directory from which vLLM reads an adapter. IdentityError: the directory is unknown before the adapter is
    loaded."""
    local = Path(os.path.expanduser(path))
    if local.is_dir():
        return local
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        raise IdentityError(f"{path} is resolved when the adapter is loaded")
    return snapshot(path, None)


def _signature(path: Path) -> _Signature:
    statuses = [(file, file.stat()) for file in adapter_files(path)]
    return tuple((file.name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for file, s in statuses)
