"""Versions of the LoRAs that requests use: which content of an adapter's files the engine computes with."""

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
"""Of each file: name, size, inode, times of its last write and its last change."""


@dataclass(slots=True)
class _Loaded:
    signature: _Signature
    version: str


class LoraVersions:
    """Names the content of each LoRA.

    vLLM reads an adapter when a request needs it and it is not loaded, and again at each use if its request says
    ``load_inplace``. The scheduler is not notified of that. So:

    1. Files that have not changed since before this object was made have the content that was loaded, whenever that
       was. Their digest is the version.
    2. Files that were changed later are taken to have been loaded as they are when the LoRA is first seen. Their
       version is of this process only.
    3. Files that changed after that have an unknown relation to the loaded content, and the LoRA has no version, until
       a request loads it in place.
    4. An adapter without files here (tensors, a name of the hub that is resolved when it is loaded) has a version of
       this process, for each ``lora_int_id``; loaded in place, it has none.
    """

    def __init__(self) -> None:
        self._made_ns = time.time_ns() - _SLACK_NS
        self._process = secrets.token_hex(16)
        self._loaded: dict[int, _Loaded] = {}
        self._warned: set[int] = set()

    def version(self, lora: "LoRARequest") -> str | None:
        """The version of the loaded content; None: it is unknown, so KV of the LoRA is neither used nor saved."""
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
    """The directory that vLLM reads an adapter from. IdentityError: it is not known before it is loaded."""
    local = Path(os.path.expanduser(path))
    if local.is_dir():
        return local
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        raise IdentityError(f"{path} is resolved when it is loaded")
    return snapshot(path, None)


def _signature(path: Path) -> _Signature:
    statuses = [(file, file.stat()) for file in adapter_files(path)]
    return tuple((file.name, s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for file, s in statuses)
